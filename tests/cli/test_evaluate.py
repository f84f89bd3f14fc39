"""``forget-concept evaluate`` and ``mini-table``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import random_patch

from forget_concept.core.formats import kohya


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
    assert set(concept["scores"]) == {"patched", "unedited", "negative_prompt", "safe_guidance"}
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


def test_another_model_is_asked_about_a_benchmarks_concepts_and_judged_by_clip(run, tiny):
    kohya.save(random_patch(tiny.survey), "p.safetensors")
    assert run("evaluate", "--patch", "p.safetensors", "--model", "other", "--concept", "star") == 1
    assert "has no concept 'star'" in run.err and "cat" in run.err
    Path("clip").mkdir()
    asked = ("evaluate", "--patch", "p.safetensors", "--model", "other", "--concept", "cat", "--clip", "clip")
    assert run(*asked) == 1
    assert "'clip'" in run.err and run.out == ""


def test_mini_table_prints_n_and_intervals(run, drawn):
    args = ("mini-table", "--count", "60", "--steps", "1", "--precision", "float32", "--out", "t.json")
    assert run(*args, "--json") == 0
    assert run.json == json.loads(Path("t.json").read_text(encoding="utf-8"))
    assert set(run.json["accuracy"]) == {"object", "style", "identity", "colour"}
    assert run.json["accuracy"]["style"] == {"value": 1.0, "low": pytest.approx(0.94, abs=0.01), "high": 1.0, "n": 60}
    assert run(*args) == 0
    assert "100.0 %" in run.out
    assert "60 held-out prompts" in run.out
