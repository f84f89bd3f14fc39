"""``forget-concept generate``: pictures with what made them inside."""

from __future__ import annotations

from pathlib import Path

import pytest
from console import LONG
from tiny import random_patch

from forget_concept.core.cli import options
from forget_concept.core.formats import kohya


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


def test_a_high_strength_of_a_patch_is_warned_of(run, tiny):
    kohya.save(random_patch(tiny.survey, scale=0.01), "p.safetensors")
    kohya.save(random_patch(tiny.survey, scale=0.01), "q.safetensors")
    common = ("generate", "--prompt", "a star", "--steps", "1", "--out", "a.png", "--patch", "p.safetensors:1.5")
    assert run(*common) == 0
    assert "warning" not in run.err
    assert run(*common, "--patch", "q.safetensors:-2") == 0
    assert "warning: q.safetensors: The strength -2 " in run.err and "p.safetensors" not in run.err


@pytest.mark.parametrize("strength", ["1e30", "-1e30", "10.5", "nan", "inf"])
def test_a_strength_out_of_range_is_refused_before_the_model(run, monkeypatch, strength):
    monkeypatch.setattr(options, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert run("generate", "--prompt", "a star", "--patch", f"p.safetensors:{strength}", "--out", "a.png") == 1
    assert "strength" in run.err and run.left == set()


def test_a_picture_that_is_not_finite_is_an_error(run, tiny):
    tiny.unet.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    assert run("generate", "--prompt", "a star", "--steps", "1", "--out", "a.png") == 1
    assert "damaged" in run.err and "conv_in.weight" in run.err and run.left == set()
