"""The patches of a picture as text of its infotext, which comes from a stranger where a picture does."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

__all__ = ["read_infotext", "write_infotext"]

# what follows a name; the name is what stands before, and looking for it from its own beginning would take a time that
# grows with the square of the text's length
_BEHIND_NAME = re.compile(r":(?P<weight>[-+.0-9eE]{1,40}):(?P<hash>[0-9a-f]{0,64})\s{0,40}(?:,|$)")
_LONGEST = 100_000  # letters of a text
_LONGEST_NAME = 1000


def write_infotext(entries: Sequence[tuple[str, float, str]]) -> str:
    """Format name, weight and hash of each patch for the infotext: ``name:weight:hash, …``."""
    return ", ".join(f"{name}:{weight:g}:{digest}" for name, weight, digest in entries)


def read_infotext(text: str) -> list[tuple[str, float, str]]:
    """Parse the output of :func:`write_infotext`; malformed entries are skipped."""
    found, behind = [], 0
    for match in _BEHIND_NAME.finditer(text[:_LONGEST]):
        _, malformed, name = text[behind : match.start()].rpartition(":")
        name = (name.partition(",")[2] if malformed else name).lstrip()
        behind = match.end()
        try:
            weight = float(match["weight"])
        except ValueError:
            continue
        if name and len(name) <= _LONGEST_NAME and math.isfinite(weight):
            found.append((name, weight, match["hash"]))
    return found
