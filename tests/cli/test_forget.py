"""``forget-concept forget``: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from console import LONG
from safetensors.torch import load_file
from tiny import fit, flags, state_hash

from forget_concept.core.cli import options
from forget_concept.core.formats import load_patch
from forget_concept.core.methods.registry import all_methods
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.request.settings import quick_settings


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


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--concept", "(star:1.3)", "--replacement", "circle"], "The concept '(star:1.3)' is words with a weight"),
        (["--concept", "embedding:foo"], "The concept 'embedding:foo' is a textual inversion"),
        (["--concept", "star", "--replacement", "((circle))"], "write 'circle'"),
        (["--concept", "star", "--preserve", "[moon]"], "preserve list '[moon]'"),
        (["--concept", "star", "--set", 'preserve_prompts=["a {red|blue} moon"]'], "'preserve_prompts'"),
    ],
)
def test_prompt_syntax_is_refused_before_a_model_is_loaded(run, monkeypatch, args, says):
    monkeypatch.setattr(options, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert run("forget", *args) == 1
    assert says in run.err and not run.left


def test_a_theme_is_forgotten_with_and_without_concepts(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FORGET_CONCEPT_THEMES", str(tmp_path))
    (tmp_path / "birds.txt").write_text("# Birds\nhawk\nraven -> cloud\n", encoding="utf-8")
    assert run("forget", "--theme", "birds", "--replacement", "leaf", "--out", "a.safetensors", "--json") == 0
    birds = [{"name": "hawk", "kind": "object", "replacement": "leaf"}]
    birds += [{"name": "raven", "kind": "object", "replacement": "cloud"}]
    assert run.json["request"]["concepts"] == birds and "theme" not in run.json["request"]
    both = ("--theme", "birds", "--concept", "star", "--kind", "object", "--replacement", "leaf")
    assert run("forget", *both, "--out", "b.safetensors", "--json") == 0
    assert [one["name"] for one in run.json["request"]["concepts"]] == ["star", "hawk", "raven"]
    Path("r.json").write_text('{"schema": 1, "theme": "birds", "theme_replacement": "leaf"}', encoding="utf-8")
    assert run("forget", "--request", "r.json", "--out", "c.safetensors") == 0
    a, c = load_patch("a.safetensors"), load_patch("c.safetensors")
    assert a.metadata["forget_concept.request"] == c.metadata["forget_concept.request"]
    assert run("themes") == 0
    assert "birds (yours): hawk, raven" in run.out and "weapons: " in run.out and str(tmp_path) in run.out
    assert run("themes", "birds") == 0
    assert run.out == "# Birds\nhawk\nraven -> cloud\n"
    assert run("themes", "--json") == 0
    assert {"name": "birds", "file": str(tmp_path / "birds.txt"), "concepts": ["hawk", "raven"]} in run.json["themes"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--theme", "fun"], "'fun' is not known"),
        (["--theme", "sea", "--replacement", "a", "--replacement", "b"], "--replacement once"),
        (["--theme", "sea", "--kind", "style"], "leave out --kind"),
        (["--theme", "sea", "--image", "fish=x.png"], "leave out --image"),
        (["--theme", "sea", "--request", "r.json"], "--request and --theme exclude each other"),
    ],
)
def test_a_theme_that_cannot_be_meant_is_refused(run, monkeypatch, args, says):
    monkeypatch.setattr(options, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert run("forget", *args) == 1
    assert says in run.err and not run.left


def test_escaped_brackets_are_brackets(run, tiny):
    plain = ("--concept", "saber_(fate)", "--replacement", "knight (old)", "--preserve", "archer_(fate)")
    escaped = [text.replace("(", r"\(").replace(")", r"\)") for text in plain]
    assert run("forget", *plain, "--out", "a.safetensors") == 0
    assert run("forget", *escaped, "--out", "b.safetensors", "--json") == 0
    assert run.json["request"]["concepts"][0]["name"] == "saber_(fate)"
    a, b = load_patch("a.safetensors"), load_patch("b.safetensors")
    assert a.metadata["forget_concept.request"] == b.metadata["forget_concept.request"]
    assert all(torch.equal(factor.delta(), b.factors[key].delta()) for key, factor in a.factors.items())


def test_a_high_strength_is_warned_of_before_the_work(run, tiny):
    for strength in ("1", "1.5"):
        assert run("forget", "--concept", "star", "--strength", strength, "--out", "p.safetensors") == 0
        assert "warning" not in run.err
    assert run("forget", "--concept", "star", "--strength", "2", "--out", "p.safetensors", "--json") == 0
    assert "warning: The strength 2 " in run.err and run.json["request"]["strength"] == 2
    Path("r.json").write_text(ForgetRequest((Concept("star"),), strength=10.0).to_json(), encoding="utf-8")
    assert run("forget", "--request", "r.json", "--out", "p.safetensors") == 0
    assert run.err.index("warning: The strength 10 ") < run.err.index("forgetting")


def test_half_precision_halves_the_file(run, tiny):
    assert run("forget", "--concept", "star", "--out", "wide.safetensors") == 0
    assert run("forget", "--concept", "star", "--out", "half.safetensors", "--dtype", "fp16") == 0
    wide, half = load_patch("wide.safetensors"), load_patch("half.safetensors")
    sizes = {
        name: sum(t.nbytes for n, t in load_file(f"{name}.safetensors").items() if not n.endswith(".alpha"))
        for name in ("wide", "half")
    }
    assert sizes["half"] * 2 == sizes["wide"]
    for key, factor in wide.factors.items():
        error = (factor.delta() - half.factors[key].delta()).norm() / factor.delta().norm()
        assert error < 2e-3


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_every_method_works_from_here(run, tiny, method):
    settings = quick_settings(all_methods()[method])
    quick = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    assert run("forget", "--concept", "star", "--method", method, *quick, "--out", "p.safetensors", "--json") == 0
    assert run.json["request"]["method"] == method
    assert run("inspect", "p.safetensors", "--json") == 0
    assert run.json["metadata"]["method"] == method


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
        (
            ["--concept", "star", "--method", "forget_me_not", "--set", "steps=1", "--context-map", "m.safetensors"],
            "context map",
        ),
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


def test_pictures_at_the_command_line(run, tiny, tmp_path):
    from PIL import Image

    tiny.vae.encode = lambda images: torch.nn.functional.avg_pool2d(images, 8)[:, [0, 1, 2, 0]]
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 20, 20)).save(tmp_path / f"{i}.png")
    quick = ["--method", "forget_me_not"]
    for setting in ("steps=1", "n_images=1", "sample_steps=1", "latents=images"):
        quick += ["--set", setting]
    assert run("forget", "--concept", "star", *quick, "--image", tmp_path, "--out", "p.safetensors", "--json") == 0
    # the request as it was asked is this machine's; the file is not
    assert run.json["request"]["concepts"][0]["images"] == [str(tmp_path)]
    assert str(tmp_path).encode() not in Path("p.safetensors").read_bytes()
    pair = ["--concept", "star", "--concept", "tree"]
    assert run("forget", *pair, *quick, "--image", f"star={tmp_path}", "--out", "q.safetensors") == 1
    assert "no images of 'tree'" in run.err
    assert run("forget", *pair, *quick, "--image", tmp_path, "--out", "q.safetensors") == 1
    assert "NAME=PATH" in run.err
    assert run("forget", "--concept", "star", "--image", tmp_path, "--out", "q.safetensors") == 1
    assert "'uce' works from words alone" in run.err and run.left == {"p.safetensors"}


def test_an_interrupted_training_goes_on_from_its_work_folder(run, tiny, monkeypatch):
    from forget_concept.core.training import loop as training

    quick = ["forget", "--concept", "star", "--method", "forget_me_not", "--set", "steps=3", "--set", "latents=zeros"]
    assert run(*quick, "--out", "whole.safetensors") == 0
    gradients, made = training._gradients, []

    def interrupted(*args):
        made.append(args[4])  # the step
        if made == [1, 2]:
            raise KeyboardInterrupt
        return gradients(*args)

    monkeypatch.setattr(training, "_gradients", interrupted)
    assert run(*quick, "--out", "p.safetensors", "--work", "work") == 130
    assert run(*quick, "--out", "p.safetensors", "--work", "work") == 0
    assert made == [1, 2, 2, 3]
    whole, resumed = (load_patch(f"{name}.safetensors") for name in ("whole", "p"))
    assert all(torch.equal(f.up, resumed.factors[key].up) for key, f in whole.factors.items())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--concept", "star", "--out", "caf\udce9.safetensors"),
        ("--concept", "caf\udce9"),
        ("--concept", "star", "--replacement", "\udce9"),
        ("--concept", "star", "--set", "templates=\udce9 {}"),
        ("--concept", "star", "--model", "caf\udce9"),
    ],
)
def test_bytes_that_are_not_utf8_are_refused_before_a_model_is_loaded(run, monkeypatch, arguments):
    monkeypatch.setattr(options, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert run("forget", *arguments) == 1
    assert "not valid Unicode" in run.err and "udce9" in run.err and run.left == set()


def test_no_file_of_the_command_is_written_over(run, tiny):
    request = Path("request.json")
    request.write_text(ForgetRequest((Concept("star"),)).to_json(), encoding="utf-8")
    Path("p.safetensors").symlink_to(request.resolve())
    for files in (
        ("--concept", "star", "--out", "a.safetensors", "--context-map", "./a.safetensors"),
        ("--request", "request.json", "--out", "p.safetensors"),
    ):
        assert run("forget", *files) == 1
        assert "the same file" in run.err
    assert "star" in request.read_text(encoding="utf-8")
    # a patch may be continued in place, and not be replaced by a map
    Path("p.safetensors").unlink()
    assert run("forget", "--concept", "star", "--out", "p.safetensors") == 0
    again = ("forget", "--concept", "moon", "--onto", "p.safetensors", "--out")
    assert run(*again, "b.safetensors", "--context-map", "p.safetensors") == 1 and "the same file" in run.err
    assert run(*again, "p.safetensors") == 0 and load_patch("p.safetensors", tiny.survey).about.history is not None
