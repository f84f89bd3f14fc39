"""Silhouettes of the objects, as polygons and ellipses in a square of side 2 around the origin.

Each function paints its silhouette with a `Pen`, with ink (1) and eraser (0). The pen supersamples, so the result is
anti-aliased coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128
_SUPER = 4

Point = tuple[float, float]


class Pen:
    """Draws in unit coordinates under a similarity transform (centre, scale, angle, mirror) onto one coverage mask."""

    def __init__(self, centre: Point, scale: float, angle: float = 0.0, mirror: bool = False) -> None:
        self.image = Image.new("L", (SIZE * _SUPER, SIZE * _SUPER), 0)
        self._draw = ImageDraw.Draw(self.image)
        self._cos, self._sin = math.cos(angle) * scale, math.sin(angle) * scale
        self._centre, self._scale, self._sign = centre, scale, -1.0 if mirror else 1.0

    def _map(self, x: float, y: float) -> Point:
        x *= self._sign
        u = self._centre[0] + x * self._cos - y * self._sin
        v = self._centre[1] + x * self._sin + y * self._cos
        return u * _SUPER, v * _SUPER

    def polygon(self, points: Sequence[Point], ink: int = 1) -> None:
        self._draw.polygon([self._map(x, y) for x, y in points], fill=255 * ink)

    def ellipse(self, x: float, y: float, rx: float, ry: float | None = None, ink: int = 1) -> None:
        ry = rx if ry is None else ry
        steps = [2 * math.pi * i / 48 for i in range(48)]
        self.polygon([(x + rx * math.cos(a), y + ry * math.sin(a)) for a in steps], ink)

    def sector(self, x: float, y: float, r: float, start: float, end: float, ink: int = 1) -> None:
        """Draw a pie slice between two angles in degrees, clockwise from the right."""
        steps = [math.radians(start + (end - start) * i / 32) for i in range(33)]
        self.polygon([(x, y)] + [(x + r * math.cos(a), y + r * math.sin(a)) for a in steps], ink)

    def line(self, points: Sequence[Point], width: float, ink: int = 1) -> None:
        pixels = max(1, round(width * self._scale * _SUPER))
        mapped = [self._map(x, y) for x, y in points]
        self._draw.line(mapped, fill=255 * ink, width=pixels, joint="curve")
        for u, v in (mapped[0], mapped[-1]):
            self._draw.ellipse((u - pixels / 2, v - pixels / 2, u + pixels / 2, v + pixels / 2), fill=255 * ink)

    def arc(self, x: float, y: float, r: float, start: float, end: float, width: float, ink: int = 1) -> None:
        steps = [math.radians(start + (end - start) * i / 32) for i in range(33)]
        self.line([(x + r * math.cos(a), y + r * math.sin(a)) for a in steps], width, ink)

    def mask(self) -> np.ndarray:
        """Return the coverage, `(128, 128)` float32 in [0, 1]."""
        return np.asarray(self.image.reduce(_SUPER), dtype=np.float32) / 255.0


def _star(p: Pen) -> None:
    points = []
    for i in range(10):
        r, a = (1.0 if i % 2 == 0 else 0.42), math.pi * i / 5 - math.pi / 2
        points.append((r * math.cos(a), r * math.sin(a)))
    p.polygon(points)


def _heart(p: Pen) -> None:
    points = []
    for i in range(64):
        a = 2 * math.pi * i / 64
        x = 16 * math.sin(a) ** 3
        y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        points.append((x / 16.5, -y / 16.5 - 0.08))
    p.polygon(points)


def _moon(p: Pen) -> None:
    p.ellipse(0, 0, 0.95)
    p.ellipse(0.45, -0.1, 0.78, ink=0)


def _house(p: Pen) -> None:
    p.polygon([(-1.0, -0.1), (0, -0.98), (1.0, -0.1)])
    p.polygon([(-0.75, -0.12), (0.75, -0.12), (0.75, 0.9), (-0.75, 0.9)])
    p.polygon([(-0.2, 0.3), (0.2, 0.3), (0.2, 0.9), (-0.2, 0.9)], ink=0)


def _tree(p: Pen) -> None:
    for top, bottom, half in ((-1.0, -0.35, 0.45), (-0.6, 0.15, 0.65), (-0.15, 0.65, 0.85)):
        p.polygon([(0, top), (half, bottom), (-half, bottom)])
    p.polygon([(-0.16, 0.6), (0.16, 0.6), (0.16, 1.0), (-0.16, 1.0)])


def _mushroom(p: Pen) -> None:
    p.sector(0, 0.05, 0.98, 180, 360)
    p.polygon([(-0.28, 0.0), (0.28, 0.0), (0.36, 0.95), (-0.36, 0.95)])


def _umbrella(p: Pen) -> None:
    p.sector(0, 0.0, 1.0, 180, 360)
    for x in (-0.66, 0.0, 0.66):
        p.ellipse(x, 0.04, 0.33, 0.2, ink=0)
    p.line([(0, -0.1), (0, 0.75)], 0.14)
    p.arc(0.2, 0.75, 0.2, 0, 180, 0.14)


def _key(p: Pen) -> None:
    p.ellipse(-0.58, 0, 0.42)
    p.ellipse(-0.58, 0, 0.18, ink=0)
    p.polygon([(-0.2, -0.12), (1.0, -0.12), (1.0, 0.12), (-0.2, 0.12)])
    p.polygon([(0.5, 0.1), (0.66, 0.1), (0.66, 0.42), (0.5, 0.42)])
    p.polygon([(0.82, 0.1), (1.0, 0.1), (1.0, 0.52), (0.82, 0.52)])


def _cup(p: Pen) -> None:
    p.ellipse(0.5, 0.0, 0.46, 0.44)
    p.ellipse(0.5, 0.0, 0.24, 0.22, ink=0)
    p.polygon([(-0.8, -0.7), (0.5, -0.7), (0.38, 0.8), (-0.68, 0.8)])


def _arrow(p: Pen) -> None:
    p.polygon([(-0.95, -0.2), (0.1, -0.2), (0.1, -0.65), (1.0, 0), (0.1, 0.65), (0.1, 0.2), (-0.95, 0.2)])


def _crown(p: Pen) -> None:
    p.polygon([(-0.9, 0.7), (-1.0, -0.55), (-0.45, 0.05), (0, -0.85), (0.45, 0.05), (1.0, -0.55), (0.9, 0.7)])


def _circle(p: Pen) -> None:
    p.ellipse(0, 0, 0.9)


def _fish(p: Pen) -> None:
    p.ellipse(-0.2, 0, 0.75, 0.48)
    p.polygon([(0.35, 0), (1.0, -0.55), (0.85, 0), (1.0, 0.55)])
    p.ellipse(-0.6, -0.12, 0.1, ink=0)


def _boat(p: Pen) -> None:
    p.polygon([(-1.0, 0.35), (1.0, 0.35), (0.6, 0.9), (-0.6, 0.9)])
    p.polygon([(0.0, -1.0), (0.0, 0.2), (0.75, 0.2)])
    p.polygon([(-0.12, -0.7), (-0.12, 0.2), (-0.65, 0.2)])


def _anchor(p: Pen) -> None:
    p.ellipse(0, -0.75, 0.24)
    p.ellipse(0, -0.75, 0.1, ink=0)
    p.line([(0, -0.55), (0, 0.8)], 0.2)
    p.line([(-0.42, -0.3), (0.42, -0.3)], 0.18)
    p.arc(0, 0.1, 0.75, 10, 170, 0.2)
    p.polygon([(-1.0, 0.35), (-0.55, 0.1), (-0.6, 0.5)])
    p.polygon([(1.0, 0.35), (0.55, 0.1), (0.6, 0.5)])


def _shell(p: Pen) -> None:
    p.sector(0, 0.75, 1.6, 222, 318)
    for i in range(7):
        a = math.radians(228 + 14 * i)
        p.ellipse(1.52 * math.cos(a), 0.75 + 1.52 * math.sin(a), 0.2)
    for a in (math.radians(248), math.radians(270), math.radians(292)):
        p.line(
            [(0.35 * math.cos(a), 0.75 + 0.35 * math.sin(a)), (1.45 * math.cos(a), 0.75 + 1.45 * math.sin(a))], 0.07, 0
        )
    p.polygon([(-0.3, 0.55), (0.3, 0.55), (0.3, 0.9), (-0.3, 0.9)])


def _bat_animal(p: Pen) -> None:
    right = [(0.12, -0.15), (0.45, -0.5), (1.0, -0.45), (0.95, 0.35), (0.7, 0.1), (0.5, 0.4), (0.3, 0.15), (0.12, 0.45)]
    p.polygon(right + [(-x, y) for x, y in reversed(right)])
    p.polygon([(-0.16, -0.15), (-0.16, -0.52), (0, -0.3), (0.16, -0.52), (0.16, -0.15)])


def _bat_club(p: Pen) -> None:
    p.polygon([(-0.78, 0.9), (-0.9, 0.78), (0.3, -0.85), (0.62, -0.95), (0.92, -0.7), (0.85, -0.35)])
    p.ellipse(-0.85, 0.85, 0.16)


def _bow_ribbon(p: Pen) -> None:
    p.polygon([(0, 0), (-0.95, -0.6), (-0.95, 0.45)])
    p.polygon([(0, 0), (0.95, -0.6), (0.95, 0.45)])
    p.ellipse(0, -0.02, 0.22)
    p.polygon([(0, 0), (-0.2, 0.95), (-0.55, 0.8)])
    p.polygon([(0, 0), (0.2, 0.95), (0.55, 0.8)])


def _bow_archery(p: Pen) -> None:
    p.arc(-0.45, 0, 0.98, -80, 80, 0.2)
    p.line([(-0.28, -0.96), (-0.28, 0.96)], 0.1)
    p.line([(-0.9, 0), (0.85, 0)], 0.1)


SILHOUETTES: dict[str, Callable[[Pen], None]] = {
    "star": _star,
    "heart": _heart,
    "moon": _moon,
    "house": _house,
    "tree": _tree,
    "mushroom": _mushroom,
    "umbrella": _umbrella,
    "key": _key,
    "cup": _cup,
    "arrow": _arrow,
    "crown": _crown,
    "circle": _circle,
    "fish": _fish,
    "boat": _boat,
    "anchor": _anchor,
    "shell": _shell,
    "bat animal": _bat_animal,
    "bat club": _bat_club,
    "bow ribbon": _bow_ribbon,
    "bow archery": _bow_archery,
}
