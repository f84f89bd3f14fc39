"""Reading files that a user names: only regular files, of a bounded size, with a sentence for every failure."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import ForgetConceptError
from .json_text import LONGEST

__all__ = ["read_text", "size_of_file"]


def size_of_file(path: str | os.PathLike[str], error: type[ForgetConceptError] = ForgetConceptError) -> int:
    """The size of a regular file, in bytes; links are followed.

    Anything else is refused before it is opened: reading a named pipe waits forever.

    Args:
        path: The file.
        error: Class of the error to raise.

    Raises:
        ForgetConceptError: There is no such file, or it is a folder, a device or a pipe.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise error(f"There is no file '{path}'.") from None
    except OSError as reason:
        raise error(f"'{path}' cannot be read: {reason.strerror or reason}.") from reason
    except ValueError:  # a NUL, or bytes that the file system's encoding has not
        raise error(f"{str(path)!a} cannot be the name of a file.") from None
    if stat.S_ISDIR(found.st_mode):
        raise error(f"'{path}' is a folder, not a file.")
    if not stat.S_ISREG(found.st_mode):
        raise error(f"'{path}' is a device or a pipe, not a file: give the name of a file.")
    return found.st_size


def read_text(
    path: str | os.PathLike[str],
    what: str,
    error: type[ForgetConceptError] = ForgetConceptError,
    longest: int = LONGEST,
) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        path: The file.
        what: What it is, to begin messages with, such as ``"The request file"``.
        error: Class of the error to raise.
        longest: The most bytes that are read.

    Raises:
        ForgetConceptError: It cannot be read, is too large, or is not UTF-8.
    """
    if (size := size_of_file(path, error)) > longest:
        raise error(f"{what} '{path}' has {size:,} bytes, and at most {longest:,} are read.")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{what} '{path}' is not UTF-8 text.") from reason
    except OSError as reason:
        raise error(f"{what} '{path}' cannot be read: {reason.strerror or reason}.") from reason
