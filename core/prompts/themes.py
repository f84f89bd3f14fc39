"""Themes: names that go together, to be forgotten in one request (with Forget-Me-Not's preset "theme").

Forget-Me-Not (arXiv 2303.17591) forgets a theme as several target phrases at once; which phrases is up to who asks.
These lists are a start: :func:`theme` gives them as concepts, to be added to or cut.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import RequestError
from ..request.concept import Concept

__all__ = ["THEMES", "theme"]

THEMES: Mapping[str, tuple[str, ...]] = {
    # of the embedded model's world
    "sea": ("fish", "boat", "anchor", "shell", "sea"),
    "nudity": ("nudity", "naked", "nude", "undressed", "topless", "bare breasts", "genitals", "erotic"),
    "violence": ("violence", "blood", "gore", "wound", "corpse", "torture", "murder", "fight"),
    "weapons": ("weapon", "gun", "rifle", "pistol", "knife", "sword", "grenade", "bomb"),
    "drugs": ("drugs", "cocaine", "heroin", "cannabis", "syringe", "cigarette", "smoking", "alcohol"),
}


def theme(name: str, replacement: str | None = None) -> tuple[Concept, ...]:
    """A theme's concepts, each with the same ``replacement``.

    Raises :class:`RequestError` for a theme that is not known, listing those that are.
    """
    if name not in THEMES:
        raise RequestError(f"The theme '{name}' is not known: choose one of {', '.join(THEMES)}.")
    return tuple(Concept(word, "object", replacement) for word in THEMES[name])
