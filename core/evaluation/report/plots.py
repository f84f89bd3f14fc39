"""Geometry of the report's plots in SVG view box units; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..intervals import Score
from ..retention import Retained
from .contents import Drift, ErosionStep

__all__ = [
    "Bar",
    "Bars",
    "Dot",
    "Dots",
    "Group",
    "Interval",
    "Lines",
    "Series",
    "Tick",
    "bars",
    "dots",
    "interval",
    "lines",
]

# the width of a phone, where text is drawn at its nominal size
WIDTH = 360.0
LEFT, RIGHT, TOP = 44.0, 8.0, 10.0
# a retained share may lie above 1
TOP_SHARE = 1.1


@dataclass(frozen=True)
class Interval:
    """A score as a line from ``low`` to ``high`` with a dot at ``at``; ``one`` is the position of 100 %."""

    low: float
    high: float
    at: float
    one: float


def interval(score: Score, width: float = 64.0) -> Interval:
    """Return the geometry of a score on a scale from 0 to 110 %, with room for the dot at both ends."""

    def x(value: float) -> float:
        return round(3 + (width - 6) * min(max(value, 0.0), TOP_SHARE) / TOP_SHARE, 2)

    return Interval(x(score.low), x(score.high), x(score.value), x(1.0))


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


def _ticks(highest: float) -> list[float]:
    """Return 0 and three to five round values up to just above ``highest``."""
    if highest <= 0:
        return [0.0, 1.0]
    rough = highest / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [step * i for i in range(math.ceil(highest / step - 1e-9) + 1)]


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Group:
    """Bars of one part of the UNet: its name and the middle of its bars."""

    label: str
    at: float
    start: float


@dataclass(frozen=True)
class Bars:
    bars: tuple[Bar, ...]
    groups: tuple[Group, ...]
    ticks: tuple[Tick, ...]
    base: float
    height: float
    width: float = WIDTH


def _part(site: str) -> str:
    """The part of the UNet that a site is in: "down 0", "mid", "up 1"."""
    words = site.replace("_blocks", "").replace("_block", "").split(".")
    return f"{words[0]} {words[1]}" if len(words) > 1 and words[1].isdecimal() else words[0]


def bars(drift: Drift) -> Bars:
    """Return one bar per site, in order, with the parts of the UNet as labels."""
    values = list(drift.values.values())
    parts = [_part(site) for site in drift.values]
    ticks = _ticks(max((abs(value) for value in values), default=0.0))
    height, base = 194.0, 172.0
    step = (WIDTH - LEFT - RIGHT) / max(len(values), 1)

    def y(value: float) -> float:
        return round(base - (base - TOP) * abs(value) / ticks[-1], 2)

    drawn = tuple(
        Bar(round(LEFT + step * i + step * 0.1, 2), y(value), round(step * 0.8, 2), round(base - y(value), 2))
        for i, value in enumerate(values)
    )
    groups = []
    for part in dict.fromkeys(parts):
        places = [i for i, one in enumerate(parts) if one == part]
        middle = LEFT + step * (places[0] + places[-1] + 1) / 2
        groups.append(Group(part, round(middle, 2), round(LEFT + step * places[0], 2)))
    marks = tuple(Tick(y(value), f"{value:.3g}") for value in ticks)
    return Bars(drawn, tuple(groups), marks, base, height)


@dataclass(frozen=True)
class Series:
    """One line and the band of its intervals, as SVG point lists."""

    name: str
    points: tuple[tuple[float, float], ...]
    line: str
    band: str


@dataclass(frozen=True)
class Lines:
    series: tuple[Series, ...]
    ticks: tuple[Tick, ...]
    steps: tuple[Tick, ...]
    base: float
    height: float
    width: float = WIDTH


def lines(steps: Sequence[ErosionStep]) -> Lines:
    """Return the lines of retention, and of erasure if measured, over the requests of a sequence."""
    base, height = 172.0, 206.0
    first, last = steps[0].step, steps[-1].step
    usable = WIDTH - LEFT - RIGHT - 16

    def x(step: int) -> float:
        share = 0.5 if first == last else (step - first) / (last - first)
        return round(LEFT + 8 + usable * share, 2)

    def y(value: float) -> float:
        return round(base - (base - TOP) * min(max(value, 0.0), TOP_SHARE) / TOP_SHARE, 2)

    def series(name: str, scores: Sequence[tuple[int, Score]]) -> Series:
        points = tuple((x(step), y(score.value)) for step, score in scores)
        upper = [(x(step), y(score.high)) for step, score in scores]
        lower = [(x(step), y(score.low)) for step, score in reversed(scores)]
        return Series(name, points, _listed(points), _listed([*upper, *lower]))

    found = [series("kept", [(one.step, one.kept) for one in steps])]
    forgotten = [(one.step, one.forgotten) for one in steps if one.forgotten is not None]
    if forgotten:
        found.append(series("forgotten", forgotten))
    every = max(1, math.ceil(len(steps) / 12))
    marks = tuple(Tick(x(one.step), str(one.step)) for one in steps[::every])
    return Lines(
        tuple(found), tuple(Tick(y(v), f"{100 * v:.0f} %") for v in (0, 0.25, 0.5, 0.75, 1)), marks, base, height
    )


@dataclass(frozen=True)
class Dot:
    """One retained concept: its name, its place, and whether it is of the forgotten concept's category."""

    name: str
    x: float
    y: float
    same: bool


@dataclass(frozen=True)
class Dots:
    dots: tuple[Dot, ...]
    ticks: tuple[Tick, ...]
    marks: tuple[Tick, ...]
    base: float
    height: float
    width: float = WIDTH


def dots(retained: Sequence[Retained], category: str) -> Dots | None:
    """Return retention over the distance in text space, one dot a concept; ``None`` where no distance is known."""
    base, height = 172.0, 206.0
    known = [(one, one.distance, one.kept) for one in retained if one.distance is not None and one.kept is not None]
    if not known:
        return None
    marks = _ticks(max(distance for _, distance, _ in known))
    usable = WIDTH - LEFT - RIGHT - 16

    def x(distance: float) -> float:
        return round(LEFT + 8 + usable * max(distance, 0.0) / marks[-1], 2)

    def y(value: float) -> float:
        return round(base - (base - TOP) * min(max(value, 0.0), TOP_SHARE) / TOP_SHARE, 2)

    return Dots(
        tuple(Dot(one.name, x(distance), y(kept.value), one.category == category) for one, distance, kept in known),
        tuple(Tick(y(v), f"{100 * v:.0f} %") for v in (0, 0.25, 0.5, 0.75, 1)),
        tuple(Tick(x(mark), f"{mark:.3g}") for mark in marks),
        base,
        height,
    )


def _listed(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)
