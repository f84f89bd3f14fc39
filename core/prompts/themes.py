"""Themes: groups of concepts that are forgotten in one request, with Forget-Me-Not's preset ``theme``.

Forget-Me-Not (arXiv 2303.17591) forgets a theme as several target phrases. These lists are starting points:
:func:`theme` returns them as concepts, to extend or shorten.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import RequestError
from ..request.concept import Concept

__all__ = ["THEMES", "theme"]

THEMES: Mapping[str, tuple[str, ...]] = {
    # objects that the embedded models draw
    "sea": ("fish", "boat", "anchor", "shell", "sea"),
    "nudity": ("nudity", "naked", "nude", "undressed", "topless", "bare breasts", "genitals", "erotic"),
    "violence": ("violence", "blood", "gore", "wound", "corpse", "torture", "murder", "fight"),
    "weapons": ("weapon", "gun", "rifle", "pistol", "knife", "sword", "grenade", "bomb"),
    "drugs": ("drugs", "cocaine", "heroin", "cannabis", "syringe", "cigarette", "smoking", "alcohol"),
}


def theme(name: str, replacement: str | None = None) -> tuple[Concept, ...]:
    """The concepts of a theme, each with the same ``replacement``.

    Raises:
        RequestError: There is no such theme; the message lists the themes.
    """
    if name not in THEMES:
        raise RequestError(f"The theme '{name}' is not known: choose one of {', '.join(THEMES)}.")
    return tuple(Concept(word, "object", replacement) for word in THEMES[name])
