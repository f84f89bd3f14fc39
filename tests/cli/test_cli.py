"""The command line as a whole: its parser, its manners, and what it leaves behind (nothing)."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import flags, random_patch

from forget_concept.core import cli
from forget_concept.core.cli import files, options
from forget_concept.core.errors import ForgetConceptError, RequestError
from forget_concept.core.formats import context_map, kohya
from forget_concept.core.methods.registry import all_methods
from forget_concept.core.models.text_entries import TOKENS
from forget_concept.core.request.settings import describe_settings

# -- the parser ---------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_loads_nothing_heavy(run):
    code = "import sys; from forget_concept.core import cli; cli.build_parser().format_help(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "diffusers", "transformers", "rich"} & set(found)
    assert run("--help") == 0
    for command in ("demo", "forget", "generate", "evaluate", "methods", "inspect", "mini-table"):
        assert command in run.out
        assert run(command, "--help") == 0
        assert "--json" in run.out
        run("--help")


def test_version(run):
    from forget_concept.core.version import VERSION

    assert run("--version") == 0
    assert VERSION in run.out


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("unlearn",),
        ("generate",),
        ("generate", "--prompt", "x", "--out", "x.png", "--steps", "0"),
        ("generate", "--prompt", "x", "--out", "x.png", "--steps", "many"),
        ("generate", "--prompt", "x", "--out", "x.png", "--guidance", "nan"),
        ("evaluate", "--patch", "x", "--count", "2"),
        ("forget", "--concept", "star", "--kind", "planet"),
        ("methods", "--frobnicate"),
    ],
)
def test_a_mistaken_line_is_one_sentence_and_code_1(run, args):
    assert run(*args) == 1
    assert run.out == ""
    assert re.fullmatch(r"forget-concept: .+\n", run.err)
    assert "--help" in run.err
    assert not run.left


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        (r"C:\patches\a.safetensors", r"C:\patches\a.safetensors", 1.0),
        (r"C:\patches\a.safetensors:2", r"C:\patches\a.safetensors", 2.0),
        ("C:a.safetensors", "C:a.safetensors", 1.0),
        ("C:/a b/c.safetensors:1e-1", "C:/a b/c.safetensors", 0.1),
    ],
)
def test_a_strength_follows_a_colon_and_a_drive_does_not_mislead(text, path, strength):
    assert options.split_strength(text) == (path, strength)


def test_a_file_whose_name_ends_like_a_strength_is_that_file(run):
    Path("odd:0.5").touch()
    assert options.split_strength("odd:0.5") == ("odd:0.5", 1.0)
    with pytest.raises(RequestError, match="'strong'"):
        options.split_strength("a.safetensors:strong")
    with pytest.raises(RequestError, match="finite"):
        options.split_strength("a.safetensors:inf")


# -- inspect and methods ------------------------------------------------------------------------------------------


def test_inspect_tells_what_made_a_patch_and_whether_it_fits(run, tiny):
    run("forget", "--concept", "star", "--preserve", "moon", "--out", "p.safetensors", "--context-map", "m.safetensors")
    assert run("inspect", "p.safetensors", "--model", "tiny", "--json") == 0
    found = run.json
    assert found["kind"] == "lora"
    assert found["layers"] == 22
    assert found["metadata"]["request"]["preserve"] == ["moon"]
    assert found["metadata"]["concepts"] == ["star"]
    assert found["fit"]["same_base"] is True
    assert 0.9 < found["fit"]["surviving_share"]["float16"] < 1.1
    assert run("inspect", "p.safetensors") == 0
    assert "22 layers" in run.out
    assert "star" in run.out
    assert run("inspect", "m.safetensors", "--json") == 0
    assert run.json["kind"] == "context_map"
    assert context_map.load("m.safetensors")[0][TOKENS].rank == run.json["rank"]


def test_inspect_says_when_a_patch_is_not_ours(run, tiny):
    kohya.save(random_patch(tiny.survey, scale=1e-6), "p.safetensors")
    assert run("inspect", "p.safetensors", "--model", "tiny") == 0
    assert "not written by this program" in run.out
    # so small an edit is lost in narrow weights, and that is said
    assert "rounded away" in run.out


def test_methods_lists_what_is_registered(run):
    assert run("methods", "--json") == 0
    listed = {method["id"]: method for method in run.json["methods"]}
    assert set(listed) == set(all_methods())
    for name, method in all_methods().items():
        assert set(listed[name]["presets"]) == set(method.presets)
        assert listed[name]["paper"].startswith("https://")
        assert [one["name"] for one in listed[name]["settings"]]
    assert run("methods") == 0
    assert all(name in run.out for name in listed)


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_methods_explains_every_setting_of_one(run, method):
    assert run("methods", method) == 0
    infos = describe_settings(all_methods()[method].Settings)
    for info in infos:
        at = run.out.index(f"--set {info.name}=...  {info.values()}\n")
        assert info.help in run.out[at:]
    assert run("methods", method, "--json") == 0
    (found,) = run.json["methods"]
    assert {one["name"]: one["about"] for one in found["settings"]} == {info.name: info.help for info in infos}
    assert run("methods", "magic") == 1 and "'magic' is not known" in run.err


# -- files and interruptions --------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(run, monkeypatch):
    path = Path("report.json")
    files.write_json(path, {"a": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    mask = os.umask(0o022)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ForgetConceptError, match="No space left"):
        files.write_json(path, {"a": 2})
    monkeypatch.undo()
    os.chdir(run.folder)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert run.left == {"report.json"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    assert run.left == {"report.json"}


def test_where_nothing_can_be_written_is_found_out_beforehand(run):
    for place in ("/dev/null/x", "missing/x", "."):
        with pytest.raises(ForgetConceptError, match="cannot be written"):
            files.check_writable(Path(place))
    Path("file").touch()
    for place in ("file", "file/below", "/dev/null/x"):
        with pytest.raises(ForgetConceptError, match="is a file"):
            files.check_folder(Path(place))
    files.check_folder(Path("new/and/deep"))
    assert run.left == {"file"}


def test_demo_asks_first_whether_it_can_write(run, monkeypatch):
    monkeypatch.setattr(options, "load_embedded", lambda *_: pytest.fail("the model was loaded for nothing"))
    Path("taken").touch()
    assert run("demo", "--out", "taken") == 1
    assert "is a file" in run.err
    assert run("demo", "--method", "magic", "--out", "fresh") == 1
    assert "magic" in run.err
    assert run.left == {"taken"}


@pytest.mark.parametrize("command", ["forget", "generate", "evaluate"])
def test_an_interruption_is_code_130_and_leaves_nothing(run, tiny, drawn, monkeypatch, command):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    args = {
        "forget": ("--concept", "star"),
        "generate": ("--prompt", "x", "--out", "folder"),
        "evaluate": ("--patch", "p", "--out", "e.json", "--precision", "float32"),
    }[command]
    monkeypatch.setattr("forget_concept.core.methods.fit.fit", interrupted)
    monkeypatch.setattr(tiny, "sample", interrupted)
    monkeypatch.setattr(drawn, "sample", interrupted)
    before = flags(tiny.unet)
    assert run(command, *args) == 130
    assert run.err.endswith("Interrupted.\n")
    assert run.out == ""
    assert not run.left
    assert flags(tiny.unet) == before
    assert not drawn.faults


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_of_writing_leaves_nothing(tmp_path, number, code):
    program = """
import os, signal, sys, time
from pathlib import Path
from forget_concept.core import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born deaf to it
from forget_concept.core.models.text_entries import TOKENS
from forget_concept.core.cli import files, methods
def slow(*args):
    print("writing", *os.listdir("."), flush=True)
    time.sleep(600)
def run(args, console):
    os.replace = slow
    files.write_bytes(Path("x"), b"half")
methods.run = run
sys.exit(cli.main(["methods"]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert ".part" in process.stdout.readline()
        process.send_signal(number)
        assert process.wait(300) == code
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_named_with_its_extra(run, monkeypatch):
    def missing(args, console):
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers.models")

    monkeypatch.setattr(cli.methods, "run", missing)
    assert run("methods") == 1
    assert "pip install 'forget-concept[cli]'" in run.err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_too_little_memory_is_said_in_words(run, monkeypatch, error):
    def short(args, console):
        raise error

    monkeypatch.setattr(cli.methods, "run", short)
    assert run("methods") == 1
    assert "memory" in run.err
    assert "--batch" in run.err


def test_a_fault_of_the_program_is_not_dressed_up(run, monkeypatch):
    def broken(args, console):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli.methods, "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("methods")


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    program = """
import sys
from forget_concept.core import cli
def run(args, console):
    return {"long": "x" * 1_000_000}  # more than a pipe holds
cli.methods.run = run
sys.exit(cli.main(["methods", "--json"]))
"""
    # an unbuffered Python drops the rest of a half-taken write without an error
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(300) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


# -- consoles of any encoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("words", ["\u661f", "\u05db\u05d5\u05db\u05d1", "caf\u00e9", "\U0001f31f"])
@pytest.mark.parametrize(
    ("encoding", "errors"),
    [("cp1252", "strict"), ("ascii", "surrogateescape"), ("cp932", "strict"), ("cp437", "strict"), ("utf-8", "strict")],
)
def test_printing_never_loses_work(tmp_path, monkeypatch, tiny, encoding, errors, words, as_json):
    """JSON is UTF-8 on every console; a person reads a replacement for what the console's encoding lacks."""
    monkeypatch.chdir(tmp_path)
    raw = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, stream in raw.items():
        how = "backslashreplace" if name == "stderr" else errors
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding, errors=how))
    more = ("--json",) if as_json else ()
    assert cli.main(["forget", "--concept", words, "--replacement", "x", "--out", f"{words}.safetensors", *more]) == 0
    sys.stdout.flush()
    assert [path.name for path in tmp_path.iterdir()] == [f"{words}.safetensors"]
    if as_json:
        assert json.loads(raw["stdout"].getvalue().decode("utf-8"))["request"]["concepts"][0]["name"] == words
    else:
        shown = words.encode(encoding, "replace").decode(encoding)
        assert f"Forgot '{shown}'" in raw["stdout"].getvalue().decode(encoding)


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "no/folder/p.safetensors", "there"])
def test_an_output_that_cannot_be_written_is_refused_before_the_model(run, monkeypatch, name):
    monkeypatch.setattr(options, "load_model", lambda *_: pytest.fail("the model was loaded"))
    Path("there").mkdir()
    assert run("forget", "--concept", "star", "--out", name) == 1
    assert "cannot be written" in run.err and run.left == {"there"}
