"""The named characters: fixed features in varying poses, as painted layers from back to front."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .shapes import Pen, Point

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Layer:
    """One flat-coloured part of a subject: coverage `(128, 128)` in [0, 1] and a colour (0–255)."""

    mask: np.ndarray
    colour: RGB


@dataclass(frozen=True)
class Pose:
    """Pose of a subject: centre in pixels, scale in pixels per unit, angle in radians, mirroring, and raised arms."""

    centre: Point
    scale: float
    angle: float = 0.0
    mirror: bool = False
    arms: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class Features:
    """Features of a character: hair cut and colour, skin, clothes, beard."""

    hair: str
    hair_colour: RGB
    skin: RGB
    clothes: str
    clothes_colour: RGB
    beard: bool = False


_PALE, _TAN, _DARK = (250, 214, 184), (226, 172, 128), (122, 74, 44)

FEATURES: dict[str, Features] = {
    "Mira Vale": Features("long", (196, 40, 30), _PALE, "dress", (40, 150, 70)),
    "Otto Brand": Features("bald", (92, 54, 24), _TAN, "suit", (40, 80, 190), beard=True),
    "Zuri Okoye": Features("afro", (24, 20, 20), _DARK, "dress", (244, 206, 40)),
    "Lena Frost": Features("bob", (246, 222, 110), _PALE, "dress", (130, 60, 180)),
    "Bruno Finch": Features("spiky", (240, 130, 24), _TAN, "suit", (206, 34, 40)),
    "Ivy Stone": Features("buns", (24, 22, 30), _PALE, "dress", (244, 120, 180)),
    "Hugo Marsh": Features("mohawk", (60, 170, 60), _TAN, "suit", (44, 44, 52)),
    "Nadia Pell": Features("long", (40, 90, 210), _DARK, "dress", (242, 130, 36)),
}
# The two faces of the biased word, selected by the scene's `variant`.
PILOT = {
    "short": Features("cap", (92, 70, 50), _TAN, "suit", (150, 122, 84)),
    "long": Features("long", (214, 214, 214), _TAN, "suit", (150, 122, 84)),
}

_HEAD: Point = (0.0, -0.42)
_R = 0.36


def _hair_behind(p: Pen, cut: str) -> None:
    x, y = _HEAD
    if cut == "long":
        p.ellipse(x, y - 0.04, 0.47, 0.46)
        p.polygon([(-0.47, y), (0.47, y), (0.5, 0.42), (-0.5, 0.42)])
    elif cut == "bob":
        p.ellipse(x, y - 0.03, 0.47, 0.45)
        p.polygon([(-0.47, y), (0.47, y), (0.5, -0.06), (-0.5, -0.06)])
    elif cut == "afro":
        p.ellipse(x, y - 0.08, 0.58, 0.52)
    elif cut == "buns":
        p.ellipse(-0.36, y - 0.34, 0.24)
        p.ellipse(0.36, y - 0.34, 0.24)
        p.ellipse(x, y - 0.06, 0.41, 0.39)
    elif cut == "spiky":
        left = [(-0.45, -0.4), (-0.62, -0.78), (-0.34, -0.74), (-0.26, -1.02), (0, -0.8)]
        p.polygon([*left, *((-x, y) for x, y in reversed(left[:-1]))])
    elif cut == "mohawk":
        p.polygon([(-0.16, -0.45), (-0.2, -1.04), (0.2, -1.04), (0.16, -0.45)])


def _hair_front(p: Pen, cut: str) -> None:
    x, y = _HEAD
    if cut in ("long", "bob", "buns", "spiky", "afro"):
        p.sector(x, y - 0.02, 0.38, 195, 345)
    elif cut == "cap":
        p.sector(x, y - 0.06, 0.42, 180, 360)
        p.line([(-0.42, y - 0.06), (0.56, y - 0.06)], 0.09)


def figure(features: Features, pose: Pose, attributes: tuple[str, ...] = ()) -> list[Layer]:
    """Paint a character as layers from back to front, with any of the attributes "hat" and "balloon"."""

    def layer(colour: RGB, *strokes: tuple[Any, ...]) -> Layer:
        pen = Pen(pose.centre, pose.scale, pose.angle, pose.mirror)
        for draw, *arguments in strokes:
            draw(pen, *arguments)
        return Layer(pen.mask(), colour)

    def body(p: Pen) -> None:
        if features.clothes == "dress":
            p.polygon([(-0.2, -0.1), (0.2, -0.1), (0.6, 0.98), (-0.6, 0.98)])
        else:
            p.polygon(
                [(-0.38, -0.08), (0.38, -0.08), (0.36, 0.98), (0.06, 0.98), (0, 0.55), (-0.06, 0.98), (-0.36, 0.98)]
            )

    def arms(p: Pen) -> None:
        for side, up in zip((-1, 1), pose.arms, strict=True):
            p.line([(0.24 * side, 0.08), (0.74 * side, -0.32 if up else 0.45)], 0.17)

    def face(p: Pen) -> None:
        p.ellipse(*_HEAD, _R)

    def eyes(p: Pen) -> None:
        p.ellipse(-0.14, -0.4, 0.055, 0.075)
        p.ellipse(0.14, -0.4, 0.055, 0.075)

    def beard(p: Pen) -> None:
        p.sector(_HEAD[0], _HEAD[1] + 0.04, 0.42, 10, 170)

    def hat(p: Pen) -> None:
        p.polygon([(-0.62, -0.7), (0.62, -0.7), (0.62, -0.58), (-0.62, -0.58)])
        p.polygon([(-0.34, -1.06), (0.34, -1.06), (0.36, -0.62), (-0.36, -0.62)])

    def string(p: Pen) -> None:
        p.line([(0.74, 0.3), (0.9, -0.5)], 0.05)

    def balloon(p: Pen) -> None:
        p.ellipse(0.92, -0.72, 0.32, 0.38)

    layers = [
        layer(features.hair_colour, (_hair_behind, features.hair)),
        layer(features.skin, (arms,)),
        layer(features.clothes_colour, (body,)),
        layer(features.skin, (face,)),
        layer(features.hair_colour, (_hair_front, features.hair)),
        layer((30, 24, 24), (eyes,)),
    ]
    if features.beard:
        layers.insert(5, layer(features.hair_colour, (beard,)))
    if "hat" in attributes:
        layers.append(layer((110, 60, 150), (hat,)))
    if "balloon" in attributes:
        layers.append(layer((60, 60, 60), (string,)))
        layers.append(layer((30, 190, 200), (balloon,)))
    return layers
