"""Atomic writing, and checks before long work that a result can be written."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ForgetConceptError, RequestError
from .names import check_unicode

__all__ = [
    "check_distinct",
    "check_folder",
    "check_writable",
    "make_folder",
    "remove_leftovers",
    "write_bytes",
    "write_folder",
    "write_json",
]

# how much check_writable tries to write, in bytes
_TRIED_BYTES = 2**20


# temporary files: their names say which process of which computer writes them
_PART = re.compile(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.part")
_COMPUTER = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_OLD = 24 * 3600  # seconds after which one of an unknown process is left over


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def _temporary(folder: Path) -> Path:
    # short, because the target's name may already have the maximum length
    return folder / f".{_COMPUTER}-{os.getpid()}-{secrets.token_hex(4)}.part"


def _running(process: int) -> bool:
    if os.name == "nt":  # where asking would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # none, or no number that a process can have
        return False
    except OSError:
        return True
    return True


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files and folders of processes that were killed while they wrote to a folder."""
    try:
        found = [(path, match) for path in folder.iterdir() if (match := _PART.fullmatch(path.name)) is not None]
        for path, match in found:
            here = match[1] == _COMPUTER
            if (here and not _running(int(match[2]))) or time.time() - path.lstat().st_mtime > _OLD:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
    except OSError:
        return  # they harm nobody, and what is to be written says what is wrong with the folder


def _target(path: Path, error: type[ForgetConceptError]) -> Path:
    """The file to write for a path: where a link leads to. Refuses what is no regular file."""
    place = Path(os.path.realpath(path)) if path.is_symlink() else path
    if place.is_dir():
        raise error(f"'{path}' cannot be written: it is a folder; give the name of a file.")
    if os.path.lexists(place) and not place.is_file():
        raise error(f"'{path}' cannot be written: it is a device, a pipe or a broken link; give the name of a file.")
    return place


def check_distinct(written: Mapping[str, Path | None], read: Mapping[str, str | Path | None] | None = None) -> None:
    """Check that nothing is written over another file of the same command; links are followed.

    Args:
        written: The files to write by what to call them, such as ``--out``; ``None``: not given.
        read: The files to read.

    Raises:
        RequestError: Two of them are the same file.
    """
    known = {_real(path): name for name, path in (read or {}).items() if path is not None}
    for name, path in written.items():
        if path is not None and (other := known.setdefault(_real(path), name)) != name:
            raise RequestError(f"{other} and {name} are the same file, '{path}': one of them would be lost.")


def _real(path: str | Path) -> str:
    return os.path.normcase(os.path.realpath(path))


def _sync_folder(folder: Path) -> None:
    """Write a folder's names to the disk, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        return  # some file systems cannot
    finally:
        os.close(handle)


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
        place = _target(path, ForgetConceptError)
        if not place.parent.is_dir():
            raise ForgetConceptError(f"'{path}' cannot be written: there is no folder '{place.parent}'.")
        remove_leftovers(place.parent)
        _try_writing(place.parent, place.name)
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
        remove_leftovers(path)
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
        target = _target(path, error)
        handle: int | None = None
        while handle is None:
            temporary = place = _temporary(target.parent)
            try:
                # tempfile would create it with mode 0600; os.open applies the umask without reading it, which is only
                # possible by changing it for every thread of the host
                handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            except FileExistsError:
                temporary = None  # somebody else's file: do not delete it
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(place, target)
        temporary = None
        _sync_folder(target.parent)
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
    temporary: Path | None = _temporary(path.parent)
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
