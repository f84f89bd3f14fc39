"""Parsing of untrusted JSON within bounds of length, depth and size."""

from __future__ import annotations

import json
import math
from typing import Any

from .names import is_unicode

__all__ = ["DIGITS", "LONGEST", "parse_json"]

LONGEST = 32 * 2**20  # characters
DEEPEST = 64  # levels of lists and objects
MOST_VALUES = 2_000_000  # commas and brackets, those within texts included
DIGITS = 40  # of a whole number; a float holds every number of so many


def parse_json(text: str, longest: int = LONGEST) -> Any:
    """Parse a text as JSON, strictly.

    Args:
        text: The text.
        longest: The most characters that are parsed.

    Raises:
        ValueError: It is too long, has more than :data:`MOST_VALUES` values, is not JSON, is nested deeper than
            :data:`DEEPEST` levels, or has a number that is not finite or has more than :data:`DIGITS` digits, or half
            of a Unicode character. The message completes "it cannot be read: …".
    """
    if len(text) > longest:
        raise ValueError(f"it has {len(text):,} characters, and at most {longest:,} are read")
    if sum(map(text.count, ",[{")) > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES:,} values")
    try:
        value = json.loads(text, parse_int=_int, parse_float=_float, parse_constant=_constant)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise ValueError(str(error)) from None
    _check(value)
    return value


_TOO_DEEP = f"it is nested too deeply, more than {DEEPEST} levels"


def _int(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"it has a number of {len(digits)} digits, and at most {DIGITS} are read")
    return int(digits)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {text[:20]}, which is too large")
    return value


def _constant(name: str) -> Any:
    raise ValueError(f"it has {name}, which is not a number")


def _check(value: Any) -> None:
    """Raise for what is nested too deeply, and for texts that are not Unicode."""
    level = [value]
    for _ in range(DEEPEST + 1):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                if not is_unicode(one):
                    raise ValueError(f"it has {one[:40]!a}, which is not valid Unicode: it holds half of a character")
            elif isinstance(one, dict):
                below += [*one, *one.values()]
            elif isinstance(one, list):
                below += one
        level = below
        if not level:
            return
    raise ValueError(_TOO_DEEP)
