"""The command line: what it writes, what it says, what it refuses, and what it leaves behind (nothing)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawn import DrawnModel, DrawnProbe, forgets
from safetensors.torch import load_file, save_file
from tiny import flags, random_patch, state_hash, tiny_model, tiny_unet

from forget_concept.core import cli
from forget_concept.core.cli import files, options
from forget_concept.core.concepts import Concept, ForgetRequest
from forget_concept.core.errors import ForgetConceptError, RequestError
from forget_concept.core.formats import context_map, kohya, load_patch
from forget_concept.core.methods import all_methods, fit
from forget_concept.core.unet import survey


class Decoder:
    def encode(self, images):
        raise NotImplementedError

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3).tanh()


class Run:
    """Runs a command in this process, in a folder of its own: its code, its words, what it left in the folder."""

    def __init__(self, capsys, folder: Path) -> None:
        self.capsys, self.folder = capsys, folder
        self.out = self.err = ""

    def __call__(self, *args: object) -> int:
        self.capsys.readouterr()
        try:
            code = cli.main([str(arg) for arg in args])
        except SystemExit as end:  # --help, --version
            code = int(end.code or 0)
        self.out, self.err = self.capsys.readouterr()
        return code

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def left(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}


@pytest.fixture()
def run(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Run(capsys, folder)


@pytest.fixture()
def tiny(monkeypatch):
    """``--model`` is a tiny real UNet, whatever it says."""
    model = tiny_model()
    model.vae = Decoder()
    monkeypatch.setattr(options, "load_model", lambda args, console: model)
    return model


@pytest.fixture()
def drawn(monkeypatch):
    """``--model mini`` draws exactly what it is told to, and ``--patch WORDS`` is one that forgets ``star``."""
    model = DrawnModel()
    patch = forgets("star", "object", lambda seed: seed % 4 == 0)
    patch.metadata = {"forget_concept.concepts": '["star"]'}
    monkeypatch.setattr(options, "load_embedded", lambda args, console: (model, DrawnProbe()))
    monkeypatch.setattr(options, "load_patches", lambda given, model: [(patch, 1.0) for _ in given])
    return model


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


# -- forget -------------------------------------------------------------------------------------------------------


def test_forget_writes_the_patch_that_fit_makes(run, tiny):
    before = state_hash(tiny.unet), flags(tiny.unet)
    code = run(
        *("forget", "--concept", "striped star", "--replacement", "circle", "--preserve", "moon", "--preserve", "tree"),
        *("--set", "ridge=0.1", "--strength", "0.8", "--out", "p.safetensors", "--json"),
    )
    assert (code, run.left) == (0, {"p.safetensors"})
    wanted = ForgetRequest(
        (Concept("striped star", "object", "circle"),), ("moon", "tree"), settings={"ridge": 0.1}, strength=0.8
    )
    patch, same = load_patch("p.safetensors", tiny.survey), fit(tiny, wanted)
    assert set(patch.factors) == set(same.factors)
    for key, factor in patch.factors.items():
        torch.testing.assert_close(factor.delta(), same.factors[key].delta(), atol=1e-6, rtol=1e-5)
    assert ForgetRequest.from_json(patch.metadata["forget_concept.request"]) == wanted
    assert set(run.json) == {"schema", "patch", "request", "layers", "rank", "bytes", "seconds", "context_map"}
    assert run.json["request"] == json.loads(wanted.to_json())
    assert run.json["bytes"] == Path("p.safetensors").stat().st_size
    assert (state_hash(tiny.unet), flags(tiny.unet)) == before


def test_a_request_file_says_the_same_as_the_options(run, tiny):
    request = ForgetRequest((Concept("star"), Concept("neon", "style", "plain")), ("moon",), strength=0.5, seed=3)
    Path("r.json").write_text(request.to_json(), encoding="utf-8")
    assert run("forget", "--request", "r.json", "--out", "a.safetensors") == 0
    args = ["--concept", "star", "--concept", "neon", "--kind", "object", "--kind", "style", "--preserve", "moon"]
    # the empty replacement is none at all to the method, but not the same request
    args += ["--strength", "0.5", "--seed", "3"]
    assert run("forget", *args, "--out", "b.safetensors") == 0
    other = ForgetRequest.from_json(load_patch("b.safetensors").metadata["forget_concept.request"])
    assert [c.replacement for c in other.concepts] == [None, None]
    assert run("forget", *args, "--replacement", "", "--replacement", "plain", "--out", "c.safetensors") == 0
    a, c = load_file("a.safetensors"), load_file("c.safetensors")
    assert all(torch.equal(a[key], c[key]) for key in a.keys() | c.keys())
    assert run("forget", "--request", "r.json", "--seed", "1", "--out", "d.safetensors") == 1
    assert "--seed" in run.err


def test_forget_names_its_file_after_the_concepts_and_says_what_it_did(run, tiny):
    assert run("forget", "--concept", "Mira Vale", "--concept", "star", "--context-map", "map.safetensors") == 0
    assert run.left == {"forget-mira-vale-star.safetensors", "map.safetensors"}
    assert "'Mira Vale' and 'star'" in run.out
    assert "forget-mira-vale-star.safetensors" in run.out
    request = json.loads(load_patch("forget-mira-vale-star.safetensors").metadata["forget_concept.request"])
    # the embedded model's world knows whose name this is
    assert [c["kind"] for c in request["concepts"]] == ["identity", "object"]
    expanded = load_patch("map.safetensors", tiny.survey)
    lora = load_patch("forget-mira-vale-star.safetensors")
    for key, factor in lora.factors.items():
        torch.testing.assert_close(factor.delta(), expanded.factors[key].delta(), atol=1e-5, rtol=1e-4)


def test_half_precision_halves_the_file(run, tiny):
    assert run("forget", "--concept", "star", "--out", "wide.safetensors") == 0
    assert run("forget", "--concept", "star", "--out", "half.safetensors", "--dtype", "fp16") == 0
    wide, half = load_patch("wide.safetensors"), load_patch("half.safetensors")
    assert half.nbytes * 2 == wide.nbytes
    for key, factor in wide.factors.items():
        error = (factor.delta() - half.factors[key].delta()).norm() / factor.delta().norm()
        assert error < 2e-3


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_every_method_works_from_here(run, tiny, method):
    quick = [] if method == "uce" else ["--set", "steps=2", "--set", "latents=zeros"]
    assert run("forget", "--concept", "star", "--method", method, *quick, "--out", "p.safetensors", "--json") == 0
    assert run.json["request"]["method"] == method
    assert run("inspect", "p.safetensors", "--json") == 0
    assert run.json["metadata"]["method"] == method


LONG = " ".join(f"word{i}" for i in range(90))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "Nothing to forget"),
        (["--concept", ""], "empty"),
        (["--concept", "  "], "empty"),
        (["--concept", LONG], "cut off"),
        (["--concept", "star", "--replacement", LONG], "cut off"),
        (["--concept", "star", "--preserve", LONG], "cut off"),
        (["--concept", "star", "--replacement", "Star "], "the concept itself"),
        (["--concept", "star", "--preserve", "moon", "--preserve", "a STAR"], "preserve list"),
        (["--concept", "star", "--preserve", ""], "preserve list"),
        (["--concept", "star", "--concept", "star"], "twice"),
        (["--concept", "star", "--method", "magic"], "'magic' is not known"),
        (["--concept", "star", "--method", ""], "method"),
        (["--concept", "star", "--preset", "best"], "no preset 'best'"),
        (["--concept", "star", "--set", "size=3"], "no setting 'size'"),
        (["--concept", "star", "--set", "ridge=wide"], "must be a number"),
        (["--concept", "star", "--set", "ridge"], "NAME=VALUE"),
        (["--concept", "star", "--strength", "0"], "strength"),
        (["--concept", "star", "--strength", "inf"], "finite"),
        (["--concept", "star", "--seed", "-1"], "too small"),
        (["--concept", "a", "--concept", "b", "--concept", "c", "--kind", "object", "--kind", "style"], "--kind"),
        (["--request", "missing.json"], "missing.json"),
        (["--concept", "star", "--out", "no/such/folder/p.safetensors"], "no folder"),
        (["--concept", "star", "--out", "."], "a folder"),
        (["--concept", "star", "--out", "/dev/null/p.safetensors"], "cannot be written"),
        (["--concept", "star", "--context-map", "no/such/map.safetensors"], "no folder"),
        (["--concept", "star", "--method", "forget_me_not", "--set", "steps=1", "--context-map", "m"], "context map"),
    ],
)
def test_forget_refuses_what_cannot_be_meant(run, tiny, args, says):
    before = state_hash(tiny.unet), flags(tiny.unet)
    assert run("forget", *args) == 1
    assert says in run.err
    assert re.fullmatch(r"(?s)(forgetting .+ s\n)?forget-concept: [^\n]+\n", run.err)
    assert run.out == ""
    assert not run.left
    assert (state_hash(tiny.unet), flags(tiny.unet)) == before


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema": 2, "concepts": [{"name": "x"}]}', '{"schema": 1, "concepts": []}', "\x00\xff", "{"]
)
def test_a_bad_request_file_is_named(run, tiny, text):
    Path("r.json").write_bytes(text.encode("latin-1"))
    assert run("forget", "--request", "r.json", "--json") == 1
    assert "r.json" in run.err
    assert run.out == ""
    assert run.left == {"r.json"}


# -- bad patches, through every command that reads one ------------------------------------------------------------


def _pickled(path, good):
    path.write_bytes(pickle.dumps({"x": 1}, 4))


def _torch_saved(path, good):
    torch.save({"x": torch.ones(2)}, path)


def _cut_off(path, good):
    path.write_bytes(good.read_bytes()[:-100])


def _cut_off_in_the_header(path, good):
    path.write_bytes(good.read_bytes()[:50])


def _words(path, good):
    path.write_text("this is no patch at all, only words", encoding="utf-8")


def _empty(path, good):
    path.touch()


def _not_a_number(path, good):
    tensors = load_file(good)
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, path)


def _another_architecture(path, good):
    kohya.save(random_patch(survey(tiny_unet(cross_attention_dim=64))), path)


def _no_matching_layer(path, good):
    layer = "lora_unet_down_blocks_9_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {"lora_up.weight": torch.ones(4, 1), "lora_down.weight": torch.ones(1, 4), "alpha": torch.ones(())}
    save_file({f"{layer}.{name}": tensor for name, tensor in tensors.items()}, path)


def _another_kind_of_lora(path, good):
    save_file({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(4, 1)}, path)


def _folder(path, good):
    path.mkdir()


def _missing(path, good):
    pass


BAD_PATCHES = [
    (_pickled, "pickle"),
    (_torch_saved, "pickle"),
    (_cut_off, "cut off"),
    (_cut_off_in_the_header, "cut off"),
    (_words, "not a safetensors file"),
    (_empty, "not a safetensors file"),
    (_not_a_number, "NaN"),
    (_another_architecture, "another architecture"),
    (_no_matching_layer, "No layer of this model matches"),
    (_another_kind_of_lora, "cross-attention"),
    (_folder, "folder"),
    (_missing, "no file"),
]


@pytest.mark.parametrize(("make", "says"), BAD_PATCHES, ids=[make.__name__[1:] for make, _ in BAD_PATCHES])
def test_a_bad_patch_is_one_sentence_and_nothing_is_written(run, tiny, tmp_path, make, says):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    kohya.save(random_patch(tiny.survey), good)
    make(bad, good)
    before = state_hash(tiny.unet), flags(tiny.unet)
    for args in (
        ("generate", "--prompt", "a star", "--out", "x.png", "--patch", good, "--patch", f"{bad}:0.5", "--steps", "1"),
        ("inspect", bad, "--model", "tiny", "--json"),
    ):
        assert run(*args) == 1
        assert says in run.err
        assert re.fullmatch(r"forget-concept: [^\n]+\n", run.err)
        assert run.out == ""
        assert not run.left
    assert (state_hash(tiny.unet), flags(tiny.unet)) == before


# -- generate -----------------------------------------------------------------------------------------------------


def pixels(path):
    from PIL import Image

    with Image.open(path) as image:
        return image.tobytes(), dict(image.text)


def test_generate_draws_one_picture_with_what_made_it_inside(run, tiny):
    patch = random_patch(tiny.survey, scale=0.5)
    kohya.save(patch, "p.safetensors")
    common = ("--prompt", "a red star", "--seed", "7", "--steps", "2", "--precision", "float32")
    assert run("generate", *common, "--out", "plain.png", "--json") == 0
    assert run.json["pictures"] == [{"file": "plain.png", "prompt": "a red star", "seed": 7}]
    assert run("generate", *common, "--patch", "p.safetensors", "--out", "on.png") == 0
    assert run("generate", *common, "--patch", "p.safetensors:0", "--out", "off.png") == 0
    halves = ("--patch", "p.safetensors:0.5", "--patch", "p.safetensors:0.5")
    assert run("generate", *common, *halves, "--out", "halves.png", "--json") == 0
    assert run.json["patches"] == [{"file": "p.safetensors", "strength": 0.5}] * 2
    assert run("generate", *common, "--negative", "red", "--out", "negative.png") == 0
    plain, notes = pixels("plain.png")
    assert notes["prompt"] == "a red star"
    assert notes["seed"] == "7"
    assert pixels("off.png")[0] == plain
    assert pixels("on.png")[0] != plain
    assert pixels("negative.png")[0] != plain
    difference = max(abs(a - b) for a, b in zip(pixels("on.png")[0], pixels("halves.png")[0], strict=True))
    assert difference <= 1
    assert "p.safetensors" in pixels("on.png")[1]["patches"]


def test_several_pictures_make_a_sheet_or_a_folder(run, tiny):
    common = ("generate", "--prompt", "a star", "--prompt", "a moon", "--count", "3", "--steps", "1", "--batch", "4")
    assert run(*common, "--out", "sheet.png", "--json") == 0
    assert [p["seed"] for p in run.json["pictures"]] == [0, 1, 2] * 2
    assert run(*common, "--out", "pictures/of it", "--json") == 0
    assert [p["file"] for p in run.json["pictures"]] == [str(Path("pictures/of it") / f"{i:04d}.png") for i in range(6)]
    assert run.left == {"sheet.png", "pictures", "pictures/of it"} | {f"pictures/of it/{i:04d}.png" for i in range(6)}
    one, other = pixels("pictures/of it/0001.png"), pixels("pictures/of it/0004.png")
    assert (one[1]["seed"], other[1]["seed"]) == ("1", "1")
    assert one[0] != other[0]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--prompt", "x", "--out", "picture.jpg"], ".png"),
        (["--prompt", "x", "--out", "no/folder/x.png"], "no folder"),
        (["--prompt", "x", "--out", "/dev/null/x/y"], "cannot be written"),
        (["--prompt", LONG, "--out", "x.png"], "cut off"),
        (["--prompt", "x", "--negative", LONG, "--out", "x.png"], "cut off"),
        (["--prompt", "x", "--out", "x.png", "--steps", "2000"], "2000"),
        (["--prompt", "x", "--out", "x.png", "--patch", "p.safetensors:much"], "'much'"),
    ],
)
def test_generate_refuses_what_cannot_be_done(run, tiny, args, says):
    assert run("generate", *args) == 1
    assert says in run.err
    assert run.out == ""
    assert not run.left


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
    assert context_map.load("m.safetensors")[0].rank == run.json["rank"]


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
    assert run("methods") == 0
    assert all(name in run.out for name in listed)


# -- evaluate and mini-table --------------------------------------------------------------------------------------


def test_evaluate_prints_the_scores_and_writes_them(run, drawn):
    args = ("evaluate", "--patch", "p", "--count", "24", "--steps", "2", "--out", "e.json", "--pictures", "e.png")
    assert run(*args, "--precision", "float32", "--json") == 0
    assert run.json == json.loads(Path("e.json").read_text(encoding="utf-8"))
    (concept,) = run.json["concepts"]
    assert (concept["concept"], concept["category"], concept["n_target"], concept["n_kept"]) == (
        "star",
        "object",
        24,
        48,
    )
    assert set(concept["scores"]) == {"patched", "unedited", "negative_prompt"}
    scores = concept["scores"]["patched"]
    assert scores["ua"]["value"] == 1
    assert scores["ua"]["n"] == 24
    for name in ("ua", "ira", "cra", "cra_target"):
        assert scores[name]["low"] <= scores[name]["value"] <= scores[name]["high"]
    assert 0.5 < scores["ira"]["value"] < 1
    assert run.left == {"e.json", "e.png"}
    assert run(*args, "--precision", "float32") == 0
    ira = scores["ira"]
    assert f"{ira['value']:.2f}  n 24" in run.out
    assert f"{ira['low']:.2f} – {ira['high']:.2f}" in run.out
    assert "negative prompt" in run.out
    assert run(*args, "--no-baselines", "--concept", "Neon", "--precision", "float32", "--json") == 0
    (concept,) = run.json["concepts"]
    assert concept["concept"] == "neon"
    assert concept["scores"]["patched"]["ua"]["value"] < 1
    assert set(concept["scores"]) == {"patched", "unedited"}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--patch", "p", "--concept", "unicorn"], "knows no concept 'unicorn'"),
        (["--patch", "p", "--concept", ""], "knows no concept"),
        (["--concept", "star"], "--patch"),
        (["--patch", "p", "--out", "no/folder/e.json"], "no folder"),
        (["--patch", "p", "--pictures", "e.gif"], ".png"),
    ],
)
def test_evaluate_refuses_what_it_cannot_measure(run, drawn, args, says):
    assert run("evaluate", *args) == 1
    assert says in run.err
    assert run.out == ""
    assert not run.left


def test_only_the_embedded_model_is_measured_by_its_probe(run, tiny):
    kohya.save(random_patch(tiny.survey), "p.safetensors")
    assert run("evaluate", "--patch", "p.safetensors", "--model", "other", "--concept", "star") == 1
    assert "--model mini" in run.err


def test_mini_table_prints_n_and_intervals(run, drawn):
    args = ("mini-table", "--count", "60", "--steps", "1", "--precision", "float32", "--out", "t.json")
    assert run(*args, "--json") == 0
    assert run.json == json.loads(Path("t.json").read_text(encoding="utf-8"))
    assert set(run.json["accuracy"]) == {"object", "style", "identity", "colour"}
    assert run.json["accuracy"]["style"] == {"value": 1.0, "low": pytest.approx(0.94, abs=0.01), "high": 1.0, "n": 60}
    assert run(*args) == 0
    assert "100.0 %" in run.out
    assert "60 held-out prompts" in run.out


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
    monkeypatch.setattr("forget_concept.core.methods.fit", interrupted)
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
