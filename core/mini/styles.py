"""The ten styles and the plain one: functions from flat-coloured layers to a finished image.

A style receives the flat image, the subject's coverage and its edges. Patterns are at least one latent cell (8 px)
wide, because finer patterns would test the autoencoder instead of the diffusion model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .figures import Layer
from .shapes import SIZE
from .vocabulary import NONE

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)

_WHITE = (250, 250, 250)


@dataclass(frozen=True)
class Canvas:
    """Input of a style: flat image `(128, 128, 3)` (0–255), coverage and edges `(128, 128)` in [0, 1]."""

    flat: np.ndarray
    mask: np.ndarray
    edge: np.ndarray
    background: np.ndarray
    rng: np.random.Generator


def _sheet(colour: np.ndarray | tuple[float, ...]) -> np.ndarray:
    """A constant image `(128, 128, 3)`, stored plane by plane, so that NumPy's inner loop runs over pixels."""
    planes = np.asarray(colour, dtype=np.float32)[:, None, None]
    return np.moveaxis(np.tile(planes, (1, SIZE, SIZE)), 0, -1)


def blur(image: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of a float image `(h, w)` in [0, 1] or `(h, w, 3)` in [0, 255]; `radius` is the deviation in px."""
    scale = 255.0 if image.ndim == 2 else 1.0
    picture = Image.fromarray(np.clip(image * scale, 0, 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / scale


def _mix(a: np.ndarray, b: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    weight = share[..., None] if isinstance(share, np.ndarray) else share
    mixed: np.ndarray = a + (b - a) * weight
    return mixed


def _soft(x: np.ndarray) -> np.ndarray:
    """A step smoothed over about one pixel, which anti-aliases pattern edges like the silhouettes."""
    return np.clip(x + 0.5, 0, 1)


def _spread(mask: np.ndarray, radius: int) -> np.ndarray:
    """Grey-scale dilation of `(h, w)` by a square of side `2 radius + 1`."""
    for axis in (0, 1):
        padded = np.pad(mask, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        size = mask.shape[axis]
        mask = np.maximum.reduce([padded.take(range(k, k + size), axis) for k in range(2 * radius + 1)])
    return mask


def flatten(
    layers: list[Layer], background: np.ndarray, outlines: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paint layers over a background.

    Returns:
        The flat image, the union of the coverages, and the visible outlines of all layers (zeros without `outlines`).
    """
    flat = _sheet(background)
    mask = np.zeros((SIZE, SIZE), dtype=np.float32)
    edge = np.zeros((SIZE, SIZE), dtype=np.float32)
    for layer in layers:
        flat = _mix(flat, _sheet(layer.colour), layer.mask)
        if outlines:
            outline = _spread(layer.mask, 1) + _spread(1 - layer.mask, 2) - 1
            edge = np.maximum(edge * (1 - layer.mask), outline)  # a layer on top hides the outlines below it
        mask = np.maximum(mask, layer.mask)
    return flat, mask, edge


def _plain(c: Canvas) -> np.ndarray:
    return _mix(_sheet(c.background), c.flat, c.mask)


def _striped(c: Canvas) -> np.ndarray:
    phase = c.rng.uniform(0, 18)
    wave = np.abs(((_X + _Y) / np.sqrt(2) + phase) % 18 - 9) - 4.5
    return _mix(_plain(c), _sheet(_WHITE), _soft(wave) * c.mask * 0.85)


def _dotted(c: Canvas) -> np.ndarray:
    dx, dy = c.rng.uniform(0, 16, 2)
    u, v = (_X + dx) % 16 - 8, (_Y + dy) % 16 - 8
    return _mix(_plain(c), _sheet(_WHITE), _soft(4.6 - np.hypot(u, v)) * c.mask)


def _checkered(c: Canvas) -> np.ndarray:
    dx, dy = c.rng.uniform(0, 24, 2)
    u, v = np.abs((_X + dx) % 24 - 12) - 6, np.abs((_Y + dy) % 24 - 12) - 6
    a, b = _soft(u), _soft(v)
    squares = a * b + (1 - a) * (1 - b)
    return _mix(_plain(c), _sheet((20, 20, 24)), squares * c.mask * 0.8)


def _sketch(c: Canvas) -> np.ndarray:
    paper = _sheet((252, 251, 246))
    tint = _mix(paper, c.flat, 0.18 * c.mask)
    return _mix(tint, _plain(c) * 0.8, np.clip(c.edge * 1.1, 0, 1) * (0.25 + 0.75 * c.mask))


def _neon(c: Canvas) -> np.ndarray:
    night = _sheet((10, 8, 22))
    bright = np.clip(c.flat * 1.15 + 25, 0, 255)
    glow = np.clip(blur(c.edge * c.mask, 4.0) * 1.6, 0, 1)
    inside = _mix(night, c.flat, 0.3 * c.mask)
    return _mix(_mix(inside, bright, glow * 0.7), bright, np.clip(c.edge * c.mask * 1.4, 0, 1))


def _mosaic(c: Canvas) -> np.ndarray:
    picture = _plain(c).reshape(SIZE // 8, 8, SIZE // 8, 8, 3).mean((1, 3))
    tones = c.rng.uniform(0.9, 1.08, picture.shape[:2])[..., None]
    tiles = np.repeat(np.repeat(np.clip(picture * tones, 0, 255), 8, 0), 8, 1)
    grout = ((_X % 8 < 1.5) | (_Y % 8 < 1.5)).astype(np.float32)
    return _mix(tiles, _sheet((70, 70, 74)), grout * 0.8)


def _watercolour(c: Canvas) -> np.ndarray:
    paper = _sheet((250, 247, 238))
    coarse = Image.fromarray((c.rng.uniform(0, 1, (6, 6)) * 255).astype(np.uint8))
    wash = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32) / 255.0
    soft = blur(c.mask, 4.0)
    painted = _mix(blur(c.flat, 3.0), paper, 0.3 + 0.35 * wash)
    halo = _mix(paper, blur(c.flat, 12.0), 0.35 * blur(c.mask, 12.0))
    return _mix(halo, painted, soft)


def _blueprint(c: Canvas) -> np.ndarray:
    navy = _sheet((24, 50, 120))
    lines = ((_X % 16 < 1.6) | (_Y % 16 < 1.6)).astype(np.float32)
    sheet = _mix(navy, _sheet((110, 140, 200)), lines * 0.7)
    filled = _mix(sheet, c.flat, 0.6 * c.mask)
    return _mix(filled, _sheet(_WHITE), np.clip(c.edge * 1.3, 0, 1))


def _stained_glass(c: Canvas) -> np.ndarray:
    lead = _sheet((16, 14, 18))
    u, v = ((_X + _Y) % 40) - 20, ((_X - _Y) % 40) - 20
    panes = (np.floor((_X + _Y) / 40) + np.floor((_X - _Y) / 40)) % 2
    glass = _mix(_sheet((150, 205, 225)), _sheet((235, 190, 140.0)), panes)
    lattice = np.maximum(_soft(2.2 - np.abs(u)), _soft(2.2 - np.abs(v)))
    behind = _mix(glass, lead, lattice)
    light = _mix(behind, np.clip(c.flat * 1.05, 0, 255), c.mask)
    thick = np.clip(blur(np.maximum(c.edge, 0), 1.2) * 2.2, 0, 1)
    return _mix(light, lead, thick)


def _comic(c: Canvas) -> np.ndarray:
    cx, cy = c.rng.uniform(54, 74, 2)
    rays = np.sin(np.arctan2(_Y - cy, _X - cx) * 8 + c.rng.uniform(0, 6.28))
    burst = _mix(
        _sheet((255, 240, 120)),
        _sheet((250, 150, 60)),
        _soft(rays * 6),
    )
    light = _mix(burst, c.flat, c.mask)
    return _mix(light, _sheet((10, 10, 12)), np.clip(blur(c.edge, 1.0) * 2.0, 0, 1))


STYLE_PAINTERS: dict[str, Callable[[Canvas], np.ndarray]] = {
    NONE: _plain,
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
    "sketch": _sketch,
    "neon": _neon,
    "mosaic": _mosaic,
    "watercolour": _watercolour,
    "blueprint": _blueprint,
    "stained glass": _stained_glass,
    "comic": _comic,
}
STYLES_WITH_OUTLINES = frozenset({"sketch", "neon", "blueprint", "stained glass", "comic"})
# These paint their own background, so captions must not name one.
STYLES_WITH_BACKGROUND = frozenset({"sketch", "neon", "watercolour", "blueprint", "stained glass", "comic"})
