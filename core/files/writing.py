"""Atomic writing, and checks before long work that a result can be written."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ForgetConceptError
from .names import check_unicode

__all__ = ["check_folder", "check_writable", "make_folder", "write_bytes", "write_folder", "write_json"]

# how much check_writable tries to write, in bytes
_TRIED_BYTES = 2**20


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def check_writable(path: Path) -> Path:
    """Check that a file can be written, by trying: its name, its folder, permissions and space; leaves nothing behind.

    Called before the long work starts.

    Args:
        path: Where the file will go, in place of one that is there.

    Returns:
        ``path`` itself.

    Raises:
        ForgetConceptError: The file cannot be written; names the reason.
    """
    check_unicode(str(path), "The name of the file")
    try:
        if path.is_dir():
            raise ForgetConceptError(f"'{path}' cannot be written: it is a folder; give the name of a file.")
        if not path.parent.is_dir():
            raise ForgetConceptError(f"'{path}' cannot be written: there is no folder '{path.parent}'.")
        _try_writing(path.parent, path.name)
    except OSError as error:
        raise ForgetConceptError(f"'{path}' cannot be written: {_why(error)}.") from error
    return path


def _try_writing(folder: Path, name: str | None = None) -> None:
    """Write to the folder as :func:`write_bytes` does, and remove it; raises :class:`OSError`.

    File systems differ in the longest name they take (encrypted folders: 143 bytes), so the names themselves are tried.
    """
    with tempfile.TemporaryFile(dir=folder, prefix=".", suffix=".part") as file:
        # a full disk can often still make an empty file
        file.write(bytes(_TRIED_BYTES))
        file.flush()
    if name is None or os.path.lexists(folder / name):
        return
    try:
        handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return  # made by another process in this moment
    os.close(handle)
    (folder / name).unlink(missing_ok=True)


def check_folder(path: Path, name: str | None = None) -> Path:
    """Check that a path is, or can be made, a folder to write to, by trying; leaves nothing behind.

    Args:
        path: The folder.
        name: Name of a file that will be written there.

    Returns:
        ``path`` itself.

    Raises:
        ForgetConceptError: The folder cannot be written to; names the reason.
    """
    check_unicode(str(path), "The name of the folder")
    made: list[Path] = []
    try:
        there = path
        while not os.path.lexists(there) and there != there.parent:
            made.append(there)
            there = there.parent
        if not there.is_dir():
            raise ForgetConceptError(f"The folder '{path}' cannot be written to: '{there}' is a file.")
        path.mkdir(parents=True, exist_ok=True)
        _try_writing(path, name)
    except OSError as error:
        raise ForgetConceptError(f"The folder '{path}' cannot be written to: {_why(error)}.") from error
    finally:
        for folder in made:
            try:
                folder.rmdir()
            except OSError:
                break  # it was not made, or another process uses it already
    return path


def make_folder(path: Path) -> Path:
    """Create a folder if it does not exist, and return it.

    Raises:
        ForgetConceptError: It cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ForgetConceptError(f"The folder '{path}' cannot be created: {_why(error)}.") from error
    return path


def write_bytes(path: Path, data: bytes, error: type[ForgetConceptError] = ForgetConceptError) -> None:
    """Write a file atomically: to a temporary file in the same folder, which then replaces the target.

    The file gets the permissions of a new file under the process's umask, even if it replaces another one.

    Args:
        path: The file; an existing one is replaced.
        data: Its contents.
        error: Class of the error to raise.

    Raises:
        ForgetConceptError: The file cannot be written; nothing is left behind then, nor after Ctrl-C.
    """
    temporary: Path | None = None
    try:
        if path.is_dir():
            raise error(f"'{path}' cannot be written: it is a folder; give the name of a file.")
        handle: int | None = None
        while handle is None:
            # a short random name, because the target's name may already have the maximum length
            temporary = place = path.parent / f".{secrets.token_hex(8)}.part"
            try:
                # tempfile would create it with mode 0600; os.open applies the umask without reading it, which is only
                # possible by changing it for every thread of the host
                handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            except FileExistsError:
                temporary = None  # somebody else's file: do not delete it
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(place, path)
        temporary = None
    except OSError as reason:
        raise error(f"'{path}' cannot be written: {_why(reason)}.") from reason
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_folder(
    path: Path,
    fill: Callable[[Path], None],
    files: Sequence[str],
    error: type[ForgetConceptError] = ForgetConceptError,
) -> None:
    """Write a folder of files: they are written beside it first, and moved when all of them are complete.

    A folder that exists cannot be replaced in one step; its files of these names are, each atomically.

    Args:
        path: The folder.
        fill: Writes the files into the folder that it is given.
        files: Names of the files, in the order in which they are replaced.
        error: Class of the error to raise.

    Raises:
        ForgetConceptError: The folder cannot be written; nothing is left behind then.
    """
    temporary: Path | None = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        assert temporary is not None
        temporary.mkdir()
        fill(temporary)
        if path.is_dir():
            for name in files:
                os.replace(temporary / name, path / name)
        else:
            os.replace(temporary, path)
            temporary = None
    except OSError as problem:
        raise error(f"'{path}' cannot be written: {_why(problem)}.") from problem
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, in UTF-8. Raises as :func:`write_bytes`."""
    write_bytes(path, (json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode())
