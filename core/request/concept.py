"""A concept to forget: its name, its kind, its replacement, and the prompt templates of each kind."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import RequestError

__all__ = [
    "KINDS",
    "Concept",
    "canonical_phrase",
    "check_templates",
    "default_replacement",
    "normalized_phrase",
    "templates",
    "unescaped",
]

KINDS = ("object", "style", "identity")

_ESCAPED = re.compile(r"\\([()\[\]])")

_TEMPLATES = {
    "object": ("a photo of {}", "a photo of a {}", "a picture of a {}", "{}"),
    "style": ("a photo in the style of {}", "a picture in the style of {}", "a {} picture", "{}"),
    "identity": ("a photo of {}", "a portrait of {}", "a picture of {}", "{}"),
}


def templates(kind: str) -> tuple[str, ...]:
    """Prompt templates for concepts of a kind, each with one ``{}`` for the name.

    The first one is the template published with Forget-Me-Not.

    Raises:
        RequestError: The kind is unknown.

    Reference:
        Zhang et al., Forget-Me-Not, arXiv 2303.17591.
    """
    if kind not in _TEMPLATES:
        raise RequestError(f"The kind '{kind}' is not known: choose one of {', '.join(KINDS)}.")
    return _TEMPLATES[kind]


def check_templates(given: Sequence[str] | None) -> None:
    """Check templates that a person set in place of those of the kind; ``None``: there are none.

    Raises:
        RequestError: The list is empty, or a template does not have exactly one ``{}``, or has other braces.
    """
    if given is not None and not given:
        raise RequestError(
            "The setting 'templates' is an empty list: leave it out to use the templates of the concept's kind."
        )
    for template in given or ():
        rest = template.replace("{}", "", 1)
        if rest == template or "{" in rest or "}" in rest:
            raise RequestError(f"The template '{template}' must have exactly one {{}} for the concept.")


def default_replacement(kind: str) -> str:
    """The replacement of a concept that names none: the empty string, for every kind.

    There is no neutral word that suits every model's vocabulary. Methods drop the concept from the prompt instead, use
    the empty prompt, or a mean of other phrases.

    Raises:
        RequestError: The kind is unknown.
    """
    templates(kind)
    return ""


def unescaped(phrase: str) -> str:
    """``phrase`` with brackets as they are read: prompts escape them, as in ``saber \\(fate\\)``."""
    return _ESCAPED.sub(r"\1", phrase)


def normalized_phrase(phrase: str) -> str:
    """``phrase`` for comparison: one Unicode form (NFC) and case, brackets without escapes, single blanks."""
    # case folding can leave a composed form, and composes nothing: Unicode's caseless matching decomposes first
    folded = unicodedata.normalize("NFD", unescaped(phrase)).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def canonical_phrase(phrase: str) -> str:
    """:func:`normalized_phrase` without a leading article: "a Star" and "star" name the same concept."""
    words = normalized_phrase(phrase).split(" ")
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


@dataclass(frozen=True)
class Concept:
    """One concept to forget.

    Args:
        name: The concept as a prompt names it.
        kind: ``"object"``, ``"style"`` or ``"identity"``.
        replacement: What the model draws instead; ``None`` or empty: nothing in particular.
        images: Paths of images and folders of images that show the concept, for methods that use images.

    Raises:
        RequestError: ``images`` is a single path instead of a list.
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
    def replacement_text(self) -> str:
        """The replacement as it stands in a prompt; the kind's default where none is given."""
        return default_replacement(self.kind) if self.replacement is None else self.replacement
