"""A node's text boxes as a request, and a patch as a report: no host in it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ..core.concepts import Concept, ForgetRequest
from ..core.errors import RequestError
from ..core.patch import Patch

__all__ = ["report", "request_from_words", "split_list"]


def split_list(text: str) -> list[str]:
    """The entries of a box: separated by commas or lines, without blanks around them; empty ones are left out."""
    return [entry.strip() for entry in re.split(r"[,\n]", text or "") if entry.strip()]


def _replacements(text: str, count: int) -> list[str | None]:
    found = split_list(text)
    if not found:
        return [None] * count
    if len(found) == 1:
        return [found[0]] * count
    if len(found) != count:
        raise RequestError(
            f"There are {count} concepts and {len(found)} replacements: give none, one for all of them, or one for "
            "each in the same order."
        )
    return list(found)


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
    """The checked request that a node's boxes ask for.

    ``concept``, ``replacement`` and ``preserve`` are lists by commas or lines; ``settings`` is a JSON object. Raises
    :class:`RequestError` in words.
    """
    names = split_list(concept)
    if not names:
        raise RequestError("The concept is empty: write what is to be forgotten.")
    concepts = tuple(
        Concept(name, kind, instead)
        for name, instead in zip(names, _replacements(replacement, len(names)), strict=True)
    )
    request = ForgetRequest(
        concepts, tuple(split_list(preserve)), method, preset, _settings(settings), float(strength), int(seed)
    )
    request.check()
    return request


def report(request: ForgetRequest, patch: Patch, seconds: float, title: str, notes: Sequence[str] = ()) -> str:
    """What was done, in lines to read."""
    lines = []
    for concept in request.concepts:
        instead = f", shown as '{concept.replacement}'" if concept.replacement else ""
        lines.append(f"forgotten: {concept.name} ({concept.kind}){instead}")
    if request.preserve:
        lines.append("kept: " + ", ".join(request.preserve))
    lines.append(f"method: {title} [{request.method}], preset {request.preset}, strength {request.strength:g}")
    if request.settings:
        lines.append("settings: " + json.dumps(dict(request.settings), ensure_ascii=False))
    size = patch.nbytes / 1024
    amount = f"{size / 1024:.1f} MB" if size >= 1024 else f"{size:.0f} kB"
    lines.append(f"patch: {len(patch)} weights, rank {patch.rank}, {amount}, made in {seconds:.1f} s")
    lines.append(f"base model: {patch.metadata.get('forget_concept.base_model', '')[:12]}")
    lines += [f"note: {note}" for note in notes]
    if note := patch.metadata.get("forget_concept.note"):
        lines.append(f"note: {note}")
    return "\n".join(lines)
