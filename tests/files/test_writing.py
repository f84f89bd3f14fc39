"""The one way to write a file: whole or not at all, an ordinary file, safe beside other threads."""

from __future__ import annotations

import errno
import os
import pathlib
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from forget_concept.core.errors import ForgetConceptError, PatchError, RequestError
from forget_concept.core.files.safetensors_io import read_safetensors, write_safetensors
from forget_concept.core.files.writing import check_distinct, check_folder, check_writable, write_bytes, write_json

ROOT = Path(__file__).parents[2]


def write_tensors(path, value=0):
    write_safetensors({"a": torch.full((1000,), float(value))}, path)


WRITERS = {
    "bytes": lambda path, value=0: write_bytes(path, bytes([value]) * 100_000),
    "json": lambda path, value=0: write_json(path, {"value": [value] * 1000}),
    "safetensors": write_tensors,
}
each_writer = pytest.mark.parametrize("writer", list(WRITERS))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_a_file_has_the_permissions_that_the_umask_leaves(tmp_path):
    """In processes of their own: the umask is every thread's."""
    program = """
import os, sys
from pathlib import Path
import torch
from forget_concept.core.files.safetensors_io import write_safetensors
from forget_concept.core.files.writing import write_bytes
mask = os.umask
for folder in sys.argv[1:]:
    if os.fork() == 0:
        os.chdir(folder)
        mask(int(folder, 8))
        os.umask = None  # nobody may set it, not for a moment
        write_bytes(Path("bytes"), b"1")
        write_safetensors({"a": torch.ones(1)}, "t.safetensors")
        assert mask(0) == int(folder, 8)
        os._exit(0)
    if os.wait()[1]:
        sys.exit("a write failed under " + folder)
"""
    masks = ("000", "022", "027", "077")
    for mask in masks:
        (tmp_path / mask).mkdir()
        (tmp_path / mask / "bytes").write_bytes(b"0")
        (tmp_path / mask / "bytes").chmod(0o600)  # what an earlier file had does not matter
    done = subprocess.run([sys.executable, "-c", program, *masks], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for mask in masks:
        for name in ("bytes", "t.safetensors"):
            assert stat.S_IMODE((tmp_path / mask / name).stat().st_mode) == 0o666 & ~int(mask, 8)


def test_no_other_code_makes_files_of_its_own_or_touches_the_umask():
    own = ROOT / "core" / "files" / "writing.py"
    for file in [*ROOT.glob("core/**/*.py"), *ROOT.glob("nodes/**/*.py"), *ROOT.glob("sd_webui_ext/**/*.py")]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"\bos\.umask\(|\bmkstemp\(|NamedTemporaryFile\(", text), file
        # the embedded model's training keeps its own half-done work
        if file != own and "train" not in file.relative_to(ROOT).parts:
            assert "os.replace(" not in text, file


@each_writer
def test_several_threads_write_one_file_and_readers_find_it_whole(tmp_path, writer):
    path, write = tmp_path / "file.safetensors", WRITERS[writer]
    whole = set()
    for value in range(4):
        write(path, value)
        whole.add(path.read_bytes())
    found, failed, stop = set(), [], threading.Event()

    def writing(value):
        try:
            for _ in range(20):
                write(path, value)
        except BaseException as error:
            failed.append(error)

    def reading():
        while not stop.is_set():
            found.add(path.read_bytes())

    writers = [threading.Thread(target=writing, args=(value,)) for value in range(4)]
    reader = threading.Thread(target=reading)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert not failed and found <= whole and path.read_bytes() in whole
    assert [p.name for p in tmp_path.iterdir()] == ["file.safetensors"]


class Full:
    """A disk that takes some bytes and no more."""

    def __init__(self, handle, mode):
        os.close(handle)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def broken_off(*_):
    raise KeyboardInterrupt


@each_writer
@pytest.mark.parametrize("there", [True, False], ids=["in place of one", "new"])
def test_broken_off_nothing_is_left_and_what_was_there_stays(tmp_path, writer, there, monkeypatch):
    path, write = tmp_path / "file.safetensors", WRITERS[writer]
    if there:
        write(path, 1)
    before = path.read_bytes() if there else None
    kind = PatchError if writer == "safetensors" else ForgetConceptError
    for name, thing, error in (
        ("fdopen", Full, kind),
        ("replace", broken_off, KeyboardInterrupt),
        ("replace", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied")), kind),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, thing)
            with pytest.raises(error) as raised:
                write(path, 2)
        if error is kind:
            assert "cannot be written" in str(raised.value) and str(path) in str(raised.value)
        assert [p.name for p in tmp_path.iterdir()] == (["file.safetensors"] if there else [])
        assert (path.read_bytes() if there else None) == before
    write(path, 2)
    assert path.read_bytes() != before


@each_writer
def test_where_nothing_can_be_written_it_is_said(tmp_path, writer):
    kind = PatchError if writer == "safetensors" else ForgetConceptError
    for path in (tmp_path, tmp_path / "absent" / "file"):
        with pytest.raises(kind, match="cannot be written"):
            WRITERS[writer](path)
    assert list(tmp_path.iterdir()) == []


def test_a_name_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("x" * 243 + ".safetensors")
    write_bytes(path, b"1")
    assert path.read_bytes() == b"1"
    write_tensors(path, 3)
    assert read_safetensors(path)[0]["a"][0] == 3


@pytest.fixture(params=[143, 255])
def longest(request, monkeypatch):
    """A file system whose names have at most so many bytes: 143 in encrypted home folders."""
    opened, made = os.open, os.mkdir

    def checked(path):
        if len(os.fsencode(os.path.basename(path))) > request.param:
            raise OSError(errno.ENAMETOOLONG, "File name too long", str(path))

    def opening(path, flags, mode=0o777, **more):
        checked(path)
        return opened(path, flags, mode, **more)

    def making(path, mode=0o777, **more):
        checked(path)
        return made(path, mode, **more)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "mkdir", making)
    if accessor := getattr(pathlib, "_NormalAccessor", None):  # Python 3.10 keeps its own reference
        monkeypatch.setattr(accessor, "mkdir", staticmethod(making))
    return request.param


@pytest.mark.parametrize("letter", ["x", "\u661f"])
def test_a_name_that_passes_the_check_can_be_written_and_no_other_passes(tmp_path, longest, letter):
    for count in (1, longest // 6, longest // 3, longest // 3 + 1, longest - 1, longest, longest + 1, 400):
        path = tmp_path / (letter * count)
        if len(path.name.encode()) <= longest:
            assert check_writable(path) == path and not list(tmp_path.iterdir())
            write_bytes(path, b"1")
            assert check_writable(path).read_bytes() == b"1"
            path.unlink()
            assert check_folder(path / "in it", "file") and not list(tmp_path.iterdir())
        else:
            for refused in (
                lambda path=path: check_writable(path),
                lambda path=path: check_folder(path / "in it"),
                lambda path=path: check_folder(tmp_path / "folder", path.name),
            ):
                with pytest.raises(ForgetConceptError, match="too long"):
                    refused()
                assert not list(tmp_path.iterdir())


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    class Disk:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Disk())
    for check in (check_writable, check_folder):
        with pytest.raises(ForgetConceptError, match="No space left"):
            check(tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["caf\udce9", "\ud800"])
def test_a_name_that_is_not_unicode_is_refused(tmp_path, name):
    for check in (check_writable, check_folder):
        with pytest.raises(ForgetConceptError, match="not valid Unicode") as refused:
            check(tmp_path / name)
        str(refused.value).encode()


def test_checking_leaves_what_is_there(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"1")
    check_folder(tmp_path / "a" / "b" / "c", "name")
    check_folder(tmp_path / "a", "file")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    assert (tmp_path / "a" / "file").read_bytes() == b"1"


def test_a_temporary_name_that_is_taken_is_left_alone(tmp_path, monkeypatch):
    names = iter(["aa", "aa", "bb"])
    monkeypatch.setattr("secrets.token_hex", lambda n: next(names))
    (tmp_path / ".aa.part").write_bytes(b"another's")
    write_bytes(tmp_path / "file", b"1")
    assert (tmp_path / ".aa.part").read_bytes() == b"another's" and (tmp_path / "file").read_bytes() == b"1"


# -- what is there already --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_only_regular_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "broken.safetensors").symlink_to("/dev/null/x")
    (tmp_path / "device.safetensors").symlink_to("/dev/null")
    for name in ("pipe.safetensors", "device.safetensors"):
        for write in (check_writable, *WRITERS.values()):
            with pytest.raises(ForgetConceptError, match="device"):
                write(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe.safetensors").stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.skipif(os.name == "nt", reason="Windows needs a right to make links")
@each_writer
def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path, writer):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "file.safetensors", tmp_path / "link.safetensors"
    target.write_bytes(b"before")
    link.symlink_to(target)
    check_writable(link)
    WRITERS[writer](link)
    assert link.is_symlink() and target.read_bytes() != b"before" and not target.is_symlink()
    # one that leads to a file that is not there yet
    other = tmp_path / "other.safetensors"
    other.symlink_to(tmp_path / "real" / "new.safetensors")
    WRITERS[writer](other)
    assert other.is_symlink() and (tmp_path / "real" / "new.safetensors").is_file()


def test_two_files_of_one_command_are_different_ones(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    check_distinct({"--out": a, "--report": b, "--pictures": None}, {"--patch": tmp_path / "c", "--request": None})
    for written, read in (
        ({"--out": a, "--report": tmp_path / "x" / ".." / "a"}, {}),
        ({"--out": a}, {"--request": a}),
    ):
        with pytest.raises(RequestError, match=r"--out .*same file|same file") as caught:
            check_distinct(written, read)
        assert "--out" in str(caught.value)
    check_distinct({"--out": a}, {"one": b, "other": b})
    if os.name != "nt":
        b.symlink_to(a)
        with pytest.raises(RequestError, match="same file"):
            check_distinct({"--out": a, "--context-map": b})


@pytest.mark.skipif(os.name == "nt", reason="asking for a process would end it on Windows")
def test_what_a_killed_process_left_is_removed_at_the_next_start(tmp_path):
    program = """
import os, sys
from pathlib import Path
from forget_concept.core.files import writing
writing.os.replace = lambda *_: os.kill(os.getpid(), 9)
writing.write_bytes(Path(sys.argv[1]), b"x" * 1000)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "file")], check=False)
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    mine = tmp_path / left.name.replace(left.name.split("-")[1], str(os.getpid()))
    mine.write_bytes(b"being written")
    foreign = tmp_path / ".00000000-1-00000000.part"
    foreign.write_bytes(b"of another computer")
    odd = tmp_path / left.name.replace(left.name.split("-")[1], "9" * 30)  # no number of a process
    odd.write_bytes(b"")
    check_writable(tmp_path / "file")
    assert not left.exists() and not odd.exists() and mine.exists() and foreign.exists()
    os.utime(foreign, (1, 1))
    check_folder(tmp_path)
    assert not foreign.exists() and mine.exists()


def test_a_file_survives_a_loss_of_power(tmp_path, monkeypatch):
    """Contents, then the name: each is on the disk before the next step."""
    order = []
    sync, rename = os.fsync, os.replace

    def synced(handle):
        order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("rename"), rename(*paths)))
    write_bytes(tmp_path / "file", b"x")
    assert order == (["file", "rename"] if os.name == "nt" else ["file", "rename", "folder"])
