"""Portable file names from user input, and a new one for each run."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path

from ..errors import ForgetConceptError, RequestError

__all__ = ["check_unicode", "fresh_file", "is_unicode", "patch_name", "printable"]

_FORBIDDEN = re.compile(r'[<>:"|?*]')
# superscript digits count as digits to Windows
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])\s*(\..*)?", re.IGNORECASE)
# what cannot be seen, or changes the order in which a name is read: controls, marks, separators, private characters
_UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Co", "Cn")
# but scripts and emoji join their characters with two of them
_JOINED = re.compile(r"(?<=[^\x00-\u024f])[\u200c\u200d](?=[^\x00-\u024f])")
# what a terminal could take for a command, or cannot show
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_LONGEST = 120
_OTHER_ENDINGS = ("ckpt", "pt", "pth", "bin", "pkl", "sft")


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8: it has no surrogates, as bytes of another encoding leave them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """An untrusted text for a terminal, a log or JSON: characters that cannot be seen are shown as their codes.

    Line breaks and tabs stay. Escape sequences could rewrite what stands on a terminal, and marks of direction change
    the order in which it is read.
    """
    if text.isascii() and text.isprintable():
        return text
    hidden = {sign for sign in set(text) - {"\n", "\t"} if unicodedata.category(sign) in _HIDDEN}
    return "".join(ascii(sign)[1:-1] if sign in hidden else sign for sign in text)


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
    """Turn the user's name for a file into folders and a stem.

    Args:
        prefix: What the user wrote: a name, or folders and a name; ``%concept%`` is replaced by the concepts.
        concepts: Names of the concepts.
        root: What to call the folder they are relative to, for error messages.

    Returns:
        The folders and the stem, without number and extension.

    Raises:
        RequestError: The name is empty, lies outside of the folder, or is not portable.
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
            f"'{prefix}' is not inside {root}: write a name, or folders and a name, without '..' and without a leading "
            "slash."
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
                f"'{part}' is not a valid file name on every system: leave out empty parts, a dot at the end and the "
                'characters < > : " | ? *.'
            )
        if unseen := next((sign for sign in _JOINED.sub("", part) if unicodedata.category(sign) in _UNSEEN), None):
            raise RequestError(
                f"The name {part!a} has the character U+{ord(unseen):04X}, which cannot be seen: leave it out."
            )
        if len(part.encode()) > _LONGEST:
            raise RequestError(f"The name '{part[:40]}…' is too long: use at most {_LONGEST} bytes.")
    return tuple(parts)


def fresh_file(folder: Path, stem: str, suffix: str, taken: Collection[str] = ()) -> Path:
    """The path ``<stem>_<number><suffix>`` with the first number that no file in the folder has.

    Args:
        folder: The folder.
        stem: The name without number and extension.
        suffix: The extension, with its dot. A number is taken whatever the extension of the file that has it.
        taken: Further stems that are taken, case-folded: files elsewhere that a host would confuse with this one.

    Raises:
        ForgetConceptError: The folder cannot be read.
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
