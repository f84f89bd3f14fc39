"""File names that every system can have, from what a person wrote, and a fresh one for each run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import ForgetConceptError, RequestError

__all__ = ["fresh_file", "patch_name"]

_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_LONGEST = 120


def patch_name(prefix: str, concepts: Sequence[str], root: str = "the LoRA folder") -> tuple[str, ...]:
    """A file's folders and its name without number and ending, from what a person wrote; ``%concept%`` is filled in.

    ``root`` says in words where they are to lie.

    Raises :class:`RequestError` for a place outside of the folder, and for names that not every system can have.
    """
    slug = re.sub(r"[^\w]+", "-", "-".join(concepts[:3]).casefold()).strip("-_")[:60] or "concept"
    if len(concepts) > 3:
        slug += f"-and-{len(concepts) - 3}-more"
    parts = [part.strip() for part in re.split(r"[/\\]", (prefix or "").replace("%concept%", slug))]
    if not "".join(parts):
        raise RequestError("The file has no name: write one, such as forget/%concept%.")
    if ".." in parts or "." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", prefix.strip()):
        raise RequestError(
            f"'{prefix}' is no place in {root}: write a name, or folders and a name, without '..' and without a slash "
            "before it."
        )
    for part in parts:
        if not part or _FORBIDDEN.search(part) or _RESERVED.fullmatch(part) or part.endswith("."):
            raise RequestError(
                f"'{part}' cannot be part of a file's name on every system: leave out empty parts, a dot at the end "
                'and the characters < > : " | ? *.'
            )
        if len(part.encode()) > _LONGEST:
            raise RequestError(f"The name '{part[:40]}…' is too long: {_LONGEST} bytes at most.")
    return tuple(parts)


def fresh_file(folder: Path, stem: str, suffix: str) -> Path:
    """The file with the first number behind ``stem`` that no file has there, whatever its ending.

    Raises :class:`ForgetConceptError` where the folder cannot be read.
    """
    try:
        taken = {path.name.casefold() for path in folder.iterdir()}
    except OSError as error:
        raise ForgetConceptError(f"The folder '{folder}' cannot be read: {error.strerror or error}.") from error
    number = 1
    while any(name.startswith(f"{stem}_{number:05}.".casefold()) for name in taken):
        number += 1
    return folder / f"{stem}_{number:05}{suffix}"
