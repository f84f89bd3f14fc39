"""File names that every system can have, from what a person wrote, and a fresh one for each run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from ..errors import ForgetConceptError, RequestError

__all__ = ["check_unicode", "fresh_file", "is_unicode", "patch_name"]

_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_LONGEST = 120
_OTHER_ENDINGS = ("ckpt", "pt", "pth", "bin", "pkl", "sft")


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8: it has no surrogates, as bytes of another encoding leave them."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def check_unicode(text: str, what: str) -> None:
    """Check that a text can be written as UTF-8.

    Args:
        text: The text.
        what: What it is, to begin the message with.

    Raises:
        RequestError: It has surrogates.
    """
    if not is_unicode(text):
        raise RequestError(
            f"{what} {text!a} is not valid Unicode: it has bytes that are not UTF-8, or half of a character. "
            "Write it in UTF-8."
        )


def patch_name(prefix: str, concepts: Sequence[str], root: str = "the LoRA folder") -> tuple[str, ...]:
    """A file's folders and its name without number and ending, from what a person wrote; ``%concept%`` is filled in.

    ``root`` says in words where they are to lie.

    Raises :class:`RequestError` for a place outside of the folder, and for names that not every system can have.
    """
    check_unicode(prefix or "", "The name of the file")
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
    stem, dot, ending = parts[-1].rpartition(".")
    if dot + ending.lower() == ".safetensors":
        parts[-1] = stem.rstrip()
    elif stem and ending.lower() in _OTHER_ENDINGS:
        raise RequestError(
            f"'{parts[-1]}' ends like a file of another kind: leave out '.{ending}'; the ending is added to the name."
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


def fresh_file(folder: Path, stem: str, suffix: str, taken: Collection[str] = ()) -> Path:
    """``<stem>_<number><suffix>`` with the first number that is free in the folder, whatever the extension.

    Args:
        taken: Stems that are not free either, case-folded: files elsewhere that a host would confuse with this one.

    Raises:
        ForgetConceptError: Where the folder cannot be read.
    """
    try:
        present = {path.name.casefold() for path in folder.iterdir()}
    except OSError as error:
        raise ForgetConceptError(f"The folder '{folder}' cannot be read: {error.strerror or error}.") from error
    for number in itertools.count(1):
        numbered = f"{stem}_{number:05}"
        folded = numbered.casefold()
        if folded not in taken and not any(name.startswith(f"{folded}.") for name in present):
            break
    return folder / f"{numbered}{suffix}"
