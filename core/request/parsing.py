"""What a person writes into the boxes of a host's page, as a request: lists, settings, names of requests."""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import RequestError
from .concept import KINDS, Concept
from .request import ForgetRequest

__all__ = ["request_from_words", "split_list"]

# commas of Latin, Chinese, Japanese and Arabic script
_BETWEEN = re.compile("[,\uff0c\u3001\u060c\\r\\n]")
_ARROW = re.compile("->|\u2192")
_KIND = re.compile(rf"\s*\(({'|'.join(KINDS)})\)$")
# direction marks and the mark of byte order, which a copied word brings along unseen
_UNSEEN = "\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"


def split_list(text: str) -> list[str]:
    """The entries of a box: separated by commas or lines, without blanks around them; empty ones are left out."""
    entries = [entry.strip().strip(_UNSEEN).strip() for entry in _BETWEEN.split(text or "")]
    return [entry for entry in entries if entry]


def _concepts(text: str, kind: str, replacement: str) -> tuple[Concept, ...]:
    """A concept an entry, ``name``, ``name (kind)`` or either with ``-> replacement`` behind it."""
    rows = [_row(entry) for entry in split_list(text)]
    if not rows:
        raise RequestError("The concept is empty: write what is to be forgotten.")
    if any(not name for name, _, _ in rows):
        raise RequestError(
            "An entry of the concepts has nothing before its arrow or its kind: write what is to be forgotten, as in "
            "'neon (style) -> sketch'."
        )
    shared = split_list(replacement)
    waiting = sum(instead is None for _, _, instead in rows)
    if shared and not waiting:
        raise RequestError("Each concept says behind its arrow what is shown instead: leave the replacement empty.")
    if len(shared) == 1:
        shared *= waiting
    if shared and len(shared) != waiting:
        raise RequestError(
            f"There are {waiting} concepts and {len(shared)} replacements for them: give none, one for all of them, or "
            "one for each in the same order."
        )
    others = iter(shared)
    return tuple(
        Concept(name, own or kind, (next(others, None) if instead is None else instead) or None)
        for name, own, instead in rows
    )


def _row(entry: str) -> tuple[str, str | None, str | None]:
    """Name, kind and replacement of an entry; ``None`` for what it leaves to the other boxes."""
    name, *instead = (part.strip() for part in _ARROW.split(entry, maxsplit=1))
    kind = _KIND.search(name)
    return _KIND.sub("", name), kind[1] if kind else None, instead[0] if instead else None


def _settings(text: str) -> dict[str, Any]:
    if not (text or "").strip():
        return {}
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RequestError(f'The settings are not JSON like {{"rank": 8}}: {error}.') from error
    if not isinstance(value, dict):
        raise RequestError('The settings must be a JSON object like {"rank": 8}.')
    return value


def request_from_words(
    concept: str,
    kind: str = "object",
    replacement: str = "",
    preserve: str = "",
    method: str = "uce",
    preset: str = "tuned",
    strength: float = 1.0,
    seed: int = 0,
    settings: str = "",
) -> ForgetRequest:
    """The request that a node's boxes ask for; a :class:`Plan` checks it.

    ``concept``, ``replacement`` and ``preserve`` are lists by commas or lines; ``settings`` is a JSON object. A concept
    may say its own kind and replacement, ``neon (style) -> sketch``; ``kind`` and ``replacement`` are for those that do
    not. Raises :class:`RequestError` in words.
    """
    concepts = _concepts(concept, kind, replacement)
    return ForgetRequest(
        concepts, tuple(split_list(preserve)), method, preset, _settings(settings), float(strength), int(seed)
    )
