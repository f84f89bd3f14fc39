"""Parsing of a page's text boxes into a request: lists, JSON settings, concepts with their kinds and replacements."""

from __future__ import annotations

import re
from typing import Any

from ..errors import RequestError
from ..files.json_text import parse_json
from .concept import KINDS, Concept, unescaped
from .request import ForgetRequest

__all__ = ["parse_concepts", "parse_request", "split_list"]

# commas of Latin, Chinese, Japanese and Arabic script
_SEPARATOR = re.compile("[,\uff0c\u3001\u060c\\r\\n]")
_ARROW = re.compile("->|\u2192")
# the blank tells a kind from a name that ends in brackets, as tags do: neon (style), but poster_(object)
_KIND = re.compile(rf"(?:^|\s+)\(({'|'.join(KINDS)})\)$")
# direction marks and byte order marks, which come along invisibly with copied text
_INVISIBLE = "\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"


def split_list(text: str) -> list[str]:
    """Split a list at commas and line breaks; entries are stripped, and empty ones dropped."""
    entries = [entry.strip().strip(_INVISIBLE).strip() for entry in _SEPARATOR.split(text or "")]
    return [entry for entry in entries if entry]


def parse_request(
    concept: str,
    kind: str = "object",
    replacement: str = "",
    preserve: str = "",
    method: str = "uce",
    preset: str = "tuned",
    strength: float = 1.0,
    seed: int = 0,
    settings: str = "",
    theme: str = "",
) -> ForgetRequest:
    """Parse a node's text boxes. The request is not checked yet; a :class:`~.plan.Plan` checks it.

    Args:
        concept: List of concepts; an entry may state its kind and replacement, as in ``neon (style) -> sketch``.
            A kind needs a blank before its bracket, which is not escaped: ``poster_(object)``, ``saber_(fate)`` and
            ``poster \\(object\\)`` are names.
        kind: Kind of the concepts that state none.
        replacement: Replacement of the concepts that state none: one for all, or a list with one for each.
        preserve: List of the retain set.
        method: Id of the method.
        preset: Name of the preset.
        strength: Strength of the edit.
        seed: Seed of the request.
        settings: Settings as a JSON object; empty: none.
        theme: Name of a theme, whose concepts are forgotten too; empty: none. With one, ``concept`` may be empty, and
            a single replacement is the theme's too.

    Raises:
        RequestError: A box cannot be parsed, or the numbers of concepts and replacements differ.
    """
    concepts = () if theme and not split_list(concept) else parse_concepts(concept, kind, replacement)
    shared = [unescaped(entry) for entry in split_list(replacement)] if theme else []
    return ForgetRequest(
        concepts,
        tuple(split_list(preserve)),
        method,
        preset,
        _parse_settings(settings),
        float(strength),
        int(seed),
        theme or None,
        shared[0] if len(shared) == 1 else None,
    )


def parse_concepts(text: str, kind: str = "object", replacement: str = "") -> tuple[Concept, ...]:
    """Parse a list of concepts; the arguments are those of :func:`parse_request`.

    Raises:
        RequestError: The list is empty or cannot be parsed, or the numbers of concepts and replacements differ.
    """
    entries = [_parse_entry(entry) for entry in split_list(text)]
    if not entries:
        raise RequestError("The concept is empty: write what is to be forgotten.")
    if any(not name for name, _, _ in entries):
        raise RequestError(
            "An entry of the concepts has nothing before its arrow or its kind: write what is to be forgotten, as in "
            "'neon (style) -> sketch'."
        )
    shared = [unescaped(entry) for entry in split_list(replacement)]
    count = sum(own is None for _, _, own in entries)
    if shared and not count:
        raise RequestError("Every concept has a replacement after its arrow: leave the replacement empty.")
    if len(shared) == 1:
        shared *= count
    if shared and len(shared) != count:
        raise RequestError(
            f"There are {count} concepts and {len(shared)} replacements for them: give none, one for all of them, or "
            "one for each in the same order."
        )
    remaining = iter(shared)
    return tuple(
        Concept(name, own_kind or kind, (next(remaining, None) if own is None else own) or None)
        for name, own_kind, own in entries
    )


def _parse_entry(entry: str) -> tuple[str, str | None, str | None]:
    """Name, kind and replacement of one concept; ``None`` for what the entry does not state."""
    name, *replacement = (part.strip() for part in _ARROW.split(entry, maxsplit=1))
    kind = _KIND.search(name)
    stated = unescaped(replacement[0]) if replacement else None
    return unescaped(_KIND.sub("", name)), kind[1] if kind else None, stated


def _parse_settings(text: str) -> dict[str, Any]:
    if not (text or "").strip():
        return {}
    try:
        value = parse_json(text)
    except ValueError as error:
        raise RequestError(f'The settings are not JSON like {{"rank": 8}}: {error}.') from error
    if not isinstance(value, dict):
        raise RequestError('The settings must be a JSON object like {"rank": 8}.')
    return value
