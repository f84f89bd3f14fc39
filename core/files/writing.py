"""Writing files whole or not at all, and saying beforehand where that cannot be done."""

from __future__ import annotations

import json
import os
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


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file beside its place and move it there in one step. Raises :class:`ForgetConceptError` in words."""
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        # mkstemp's files are their owner's alone; what a command writes is an ordinary file
        mask = os.umask(0o022)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise ForgetConceptError(f"'{path}' cannot be written: {_why(error)}.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write one JSON object, UTF-8."""
    write_bytes(path, (json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode())
