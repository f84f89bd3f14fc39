"""A sequence of requests from the command line: ``forget --onto``, ``restore``, and what ``inspect`` says of it."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from tiny import fit, flags, random_patch, state_hash, tiny_model

from forget_concept.core.cli import build_parser, options
from forget_concept.core.cli.forget import read_request
from forget_concept.core.formats import context_map, kohya, load_patch
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.methods.sequence import History
from forget_concept.core.models.text_entries import TOKENS

FEW = ("--set", "contexts=false", "--set", "keep_common=false")
QUICK = ("--method", "forget_me_not", *("--set", "steps=2", "--set", "latents=zeros", "--set", "lr=0.01"))


def history(file) -> History:
    return History.from_patch(kohya.load(file))


A = ("forget", "--concept", "star", "--replacement", "circle", *FEW)
B = ("forget", "--concept", "fish", *QUICK, "--seed", "4")
C = ("forget", "--concept", "boat", "--preserve", "moon", *FEW)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``a``: a closed form; ``b``: a trained request onto it; ``c``: a second closed form onto both."""
    folder, model, found = tmp_path_factory.mktemp("made"), tiny_model(), History()
    for name, words in (("a", A), ("b", B), ("c", C)):
        args = build_parser().parse_args(words)
        found = found.forget(model, plan_request(read_request(args)))
        kohya.save(found.patch, folder / f"{name}.safetensors")
    return folder


@pytest.fixture()
def three(run, tiny, made):
    """A folder with these three files."""
    for file in made.iterdir():
        shutil.copy(file, run.folder)
    return run


def test_onto_starts_from_a_file_and_holds_both(run, tiny, made):
    assert run(*A, "--out", "a.safetensors") == 0
    assert run(*B, "--onto", "a.safetensors", "--out", "b.safetensors") == 0
    assert run(*C, "--onto", "b.safetensors", "--out", "c.safetensors", "--json") == 0
    said = run.json
    assert [one["number"] for one in said["requests"]] == [1, 2, 3]
    assert said["request"]["concepts"][0]["name"] == "boat" == said["requests"][2]["request"]["concepts"][0]["name"]
    for name in "abc":
        wanted, written = (kohya.load(folder / f"{name}.safetensors") for folder in (made, run.folder))
        for key, factor in wanted.factors.items():
            assert torch.equal(factor.up, written.factors[key].up)
            assert torch.equal(factor.down, written.factors[key].down)


def test_the_model_is_left_alone(run, tiny):
    before = state_hash(tiny.unet), flags(tiny.unet)
    assert run("forget", "--concept", "star", *FEW, "--out", "a.safetensors") == 0
    assert run("forget", "--concept", "fish", *QUICK, "--onto", "a.safetensors") == 0
    assert run.left == {"a.safetensors", "forget-star-fish.safetensors"}
    assert "It holds 2 requests: 'star', 'fish'." in run.out
    assert run("restore", "forget-star-fish.safetensors", "--concept", "star", "--out", "b.safetensors") == 0
    assert (state_hash(tiny.unet), flags(tiny.unet)) == before


def test_restore_takes_a_trained_request_out_without_a_model(three, monkeypatch):
    def refuse(args, console):
        raise AssertionError("no model is needed to leave a part away")

    monkeypatch.setattr(options, "load_model", refuse)
    assert three("restore", "c.safetensors", "--concept", "fish", "--out", "d.safetensors", "--json") == 0
    assert three.json["restored"] == ["fish"] and [r["number"] for r in three.json["requests"]] == [1, 3]
    whole, less = history("c.safetensors"), history("d.safetensors")
    assert [c.name for c in less.concepts] == ["star", "boat"]
    joint = whole.parts[0].patch
    assert all(torch.equal(f.up, joint.factors[k].up) for k, f in less.patch.factors.items())


def test_restore_solves_a_closed_form_again(three, tiny):
    assert three("restore", "c.safetensors", "--concept", "the STAR", "--out", "d.safetensors") == 0
    assert "Restored 'star'" in three.out and "'fish' were trained on top of it" in three.out
    less = history("d.safetensors")
    assert [c.name for c in less.concepts] == ["fish", "boat"]
    alone = fit(tiny, less.requests[1])
    for key, factor in less.parts[0].patch.factors.items():
        torch.testing.assert_close(factor.delta(), alone.factors[key].delta(), atol=1e-6, rtol=1e-5)
    assert three("restore", "c.safetensors", "--number", "3", "--number", "1", "--out", "e.safetensors") == 0
    assert [c.name for c in history("e.safetensors").concepts] == ["fish"]


def test_a_context_map_is_continued_and_restored(run, tiny):
    first = ("forget", "--concept", "star", *FEW, "--out", "a.safetensors", "--context-map", "am.safetensors")
    assert run(*first) == 0
    onto = ("forget", "--concept", "fish", *FEW, "--onto", "am.safetensors", "--out", "b.safetensors")
    assert run(*onto, "--context-map", "bm.safetensors") == 0
    assert run("restore", "bm.safetensors", "--concept", "fish", "--out", "c.safetensors") == 0
    a, c = kohya.load("a.safetensors"), kohya.load("c.safetensors")
    for key, factor in a.factors.items():
        torch.testing.assert_close(c.factors[key].delta(), factor.delta(), atol=1e-6, rtol=1e-5)
    assert context_map.load("bm.safetensors")[0][TOKENS].rank == load_patch("b.safetensors").rank


def test_inspect_shows_the_record(three):
    assert three("inspect", "c.safetensors") == 0
    lines = [line.strip() for line in three.out.splitlines()]
    assert "It was made by these requests, in this order:" in lines
    assert "1. 'star' (replaced by 'circle'): uce (tuned), solved jointly with the others of its method" in lines
    assert any(re.fullmatch(r"2\. 'fish': forget_me_not \(tuned\), rank up to \d+", line) for line in lines)
    assert "history:" not in three.out
    assert three("inspect", "c.safetensors", "--json") == 0
    assert [len(part["requests"]) for part in three.json["metadata"]["history"]["parts"]] == [2, 1]
    assert three("forget", "--concept", "key", *FEW, "--out", "k.safetensors") == 0
    assert three("inspect", "k.safetensors") == 0 and "made by these requests" not in three.out
    broken = kohya.load("c.safetensors").with_metadata(history={})
    kohya.save(broken, "x.safetensors")
    assert three("inspect", "x.safetensors") == 0 and "cannot be read" in three.out


def test_a_bound_of_the_rank_is_kept_and_said(three):
    onto = ("forget", "--concept", "key", *QUICK, "--onto", "c.safetensors", "--out", "d.safetensors")
    assert three(*onto, "--max-rank", "3", "--json") == 0
    assert three.json["rank"] == 3
    assert three("restore", "d.safetensors", "--concept", "key", "--out", "e.safetensors") == 1
    assert "'key' cannot be taken back: the patch was cut to rank 3" in three.err
    assert three("inspect", "d.safetensors") == 0 and "so it cannot be taken back" in three.out
    # the bound is the file's: the next one keeps to it
    onto = ("forget", "--concept", "cup", *QUICK, "--onto", "d.safetensors", "--out", "f.safetensors", "--json")
    assert three(*onto) == 0
    assert three.json["rank"] == 3


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--concept", "star", "--onto", "c.safetensors"], "'star' is already forgotten, by request 1"),
        (["--concept", "moon", "--onto", "c.safetensors"], "request 3 ('boat') preserves 'moon'"),
        (["--concept", "circle", "--onto", "c.safetensors"], "request 1 shows it instead of 'star'"),
        (["--concept", "key", "--preserve", "fish", "--onto", "c.safetensors"], "request 2 forgot 'fish'"),
        (["--concept", "key", "--replacement", "boat", "--onto", "c.safetensors"], "request 3 forgot it"),
        (["--concept", "key", "--set", "ridge=7", "--onto", "c.safetensors"], "need the same settings: '"),
        (["--concept", "key", "--onto", "none.safetensors"], "no file 'none.safetensors'"),
        (["--concept", "key", "--onto", "strange.safetensors"], "does not say which requests"),
        (["--concept", "key", "--max-rank", "4"], "--onto"),
        (["--concept", "key", "--onto", "c.safetensors", "--max-rank", "0"], "too small"),
    ],
)
def test_what_cannot_follow_is_refused_before_a_model_is_loaded(three, tiny, monkeypatch, args, says):
    kohya.save(random_patch(tiny.survey), "strange.safetensors")
    before = three.left

    def refuse(args, console):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(options, "load_model", refuse)
    assert three("forget", *args) == 1
    assert says in three.err and re.fullmatch(r"forget-concept: [^\n]+\n", three.err)
    assert three.out == "" and three.left == before


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["c.safetensors", "--concept", "key"], "does not forget 'key': its requests are 1 ('star')"),
        (["c.safetensors", "--number", "9"], "a request number 9"),
        (["c.safetensors"], "give --concept NAME or --number N"),
        (["c.safetensors", "--number", "0"], "too small"),
        (["a.safetensors", "--concept", "star"], "'a.safetensors' would be empty"),
        (["none.safetensors", "--concept", "star"], "no file 'none.safetensors'"),
        (["strange.safetensors", "--concept", "star"], "does not say which requests"),
    ],
)
def test_restore_refuses_what_it_cannot_do(three, tiny, args, says):
    kohya.save(random_patch(tiny.survey), "strange.safetensors")
    before = three.left
    assert three("restore", *args, "--out", "d.safetensors") == 1
    assert says in three.err and three.out == "" and three.left == before


def test_another_base_model_is_refused(three, monkeypatch):
    other = tiny_model(seed=1)
    monkeypatch.setattr(options, "load_model", lambda args, console: other)
    before = three.left
    assert three("forget", "--concept", "key", *FEW, "--onto", "c.safetensors") == 1
    assert "another base model ('tiny')" in three.err
    assert three("restore", "c.safetensors", "--concept", "star", "--out", "d.safetensors") == 1
    assert "another base model ('tiny')" in three.err
    assert three.left == before


def test_metadata_is_plain_json(three):
    said = kohya.load("c.safetensors").metadata
    assert json.loads(said["forget_concept.concepts"]) == ["star", "fish", "boat"]
    assert said["forget_concept.method"] == "uce + forget_me_not"
