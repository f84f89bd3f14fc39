"""Writing files whole or not at all, and saying beforehand where that cannot be done."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ForgetConceptError

__all__ = ["check_folder", "check_writable", "make_folder", "write_bytes", "write_json"]


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def check_writable(path: Path) -> Path:
    """``path`` itself, once it is sure that a file can be put there; leaves nothing behind.

    Asked before the long work starts. Raises :class:`ForgetConceptError` in words.
    """
    if path.is_dir():
        raise ForgetConceptError(f"'{path}' cannot be written: it is a folder; give the name of a file.")
    if not path.parent.is_dir():
        raise ForgetConceptError(f"'{path}' cannot be written: there is no folder '{path.parent}'.")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ForgetConceptError(f"'{path}' cannot be written: {_why(error)}.") from error
    return path


def check_folder(path: Path) -> Path:
    """``path`` itself, once it is sure that it is, or can be made, a folder to write to; leaves nothing behind.

    Raises :class:`ForgetConceptError` in words.
    """
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ForgetConceptError(f"The folder '{path}' cannot be written to: '{there}' is a file.")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ForgetConceptError(f"The folder '{path}' cannot be written to: {_why(error)}.") from error
    return path


def make_folder(path: Path) -> Path:
    """``path`` as a folder, made where it is missing. Raises :class:`ForgetConceptError` in words."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ForgetConceptError(f"The folder '{path}' cannot be made: {_why(error)}.") from error
    return path


def write_bytes(path: Path, data: bytes, error: type[ForgetConceptError] = ForgetConceptError) -> None:
    """Write a file whole or not at all: under another name beside its place first, then moved there in one step.

    The file has the permissions of any new file, as the process's umask leaves them, whatever an earlier one had.

    Args:
        path: Where the file goes, in place of one that is there.
        data: Its contents.
        error: The class of the error that is raised.

    Raises:
        ForgetConceptError: The place cannot be written, in words; nothing is left behind then, nor after Ctrl-C.
    """
    temporary: Path | None = None
    try:
        if path.is_dir():
            raise error(f"'{path}' cannot be written: it is a folder; give the name of a file.")
        handle: int | None = None
        while handle is None:
            # a short name of its own: the file's own name may be as long as names can be
            temporary = place = path.parent / f".{secrets.token_hex(8)}.part"
            try:
                # not by tempfile, whose files are their owner's alone: the umask applies by itself here, and is never
                # asked for, which would mean to set it for every thread of a host
                handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            except FileExistsError:
                temporary = None  # another's
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(place, path)
        temporary = None
    except OSError as reason:
        raise error(f"'{path}' cannot be written: {_why(reason)}.") from reason
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write one JSON object, UTF-8."""
    write_bytes(path, (json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode())
