"""A concept: what to forget, its kind, and the prompts that name it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import RequestError

__all__ = ["KINDS", "Concept", "canonical_phrase", "default_replacement", "normalized_phrase", "templates"]

KINDS = ("object", "style", "identity")

_TEMPLATES = {
    "object": ("a photo of {}", "a photo of a {}", "a picture of a {}", "{}"),
    "style": ("a photo in the style of {}", "a picture in the style of {}", "a {} picture", "{}"),
    "identity": ("a photo of {}", "a portrait of {}", "a picture of {}", "{}"),
}


def templates(kind: str) -> tuple[str, ...]:
    """Prompt templates, each with one ``{}``, that say a concept of this kind.

    The first one is the published one of Forget-Me-Not (arXiv 2303.17591).
    Raises :class:`RequestError` for an unknown kind.
    """
    if kind not in _TEMPLATES:
        raise RequestError(f"The kind '{kind}' is not known: choose one of {', '.join(KINDS)}.")
    return _TEMPLATES[kind]


def default_replacement(kind: str) -> str:
    """What a concept without a replacement turns into: nothing (``""``), whatever its kind.

    No neutral word is put in its place, because which word is neutral depends on the model's own vocabulary; a method
    then works with the prompt from which the concept is dropped, or with the empty prompt.
    """
    templates(kind)
    return ""


def normalized_phrase(phrase: str) -> str:
    """``phrase`` as it is compared: without regard to case, blanks at the ends and the number of blanks between."""
    return " ".join(phrase.casefold().split())


def canonical_phrase(phrase: str) -> str:
    """``phrase`` normalised, without a leading article: "a Star" and "star" ask for the same thing."""
    words = normalized_phrase(phrase).split(" ")
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


@dataclass(frozen=True)
class Concept:
    """One thing to forget: its ``name``, its ``kind`` (object, style or identity) and what to show instead, if any.

    ``images``: files and folders of pictures, for methods that look at some.
    """

    name: str
    kind: str = "object"
    replacement: str | None = None
    images: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.images, (str, os.PathLike)):
            raise RequestError(f"The images of '{self.name}' must be a list of files and folders.")
        object.__setattr__(self, "images", tuple(str(path) for path in self.images))

    @property
    def instead(self) -> str:
        """The replacement, or the default one of the kind."""
        return default_replacement(self.kind) if self.replacement is None else self.replacement
