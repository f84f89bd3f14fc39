"""The main job on the shipped model, through the command line: words in, patches, pictures and figures out."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from forget_concept.core import cli
from forget_concept.core.formats import load_patch
from forget_concept.core.mini import load
from forget_concept.core.request.request import ForgetRequest

FRACTION = {"type": "number", "minimum": 0, "maximum": 2}  # a share of the unedited model's may lie above 1
REPORT = {
    "type": "object",
    "additionalProperties": False,
    "required": ["schema", "concepts"],
    "properties": {
        "schema": {"const": 1},
        "concepts": {
            "type": "array",
            "minItems": 3,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": [
                    *("concept", "category", "method", "preset", "ua", "ira", "cra", "cra_target"),
                    *("n_target", "n_kept", "patch"),
                ],
                "properties": {
                    "concept": {"type": "string"},
                    "category": {"enum": ["object", "style", "identity"]},
                    "method": {"type": "string"},
                    "preset": {"type": "string"},
                    "ua": {"type": "number", "minimum": 0, "maximum": 1},
                    "ira": FRACTION,
                    "cra": FRACTION,
                    "cra_target": FRACTION,
                    "n_target": {"type": "integer", "minimum": 1},
                    "n_kept": {"type": "integer", "minimum": 1},
                    "patch": {"type": "string"},
                },
            },
        },
    },
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A short demonstration: what it wrote, with few pictures and steps."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert cli.main(["demo", "--out", str(folder), "--count", "4", "--steps", "6"]) == 0
    return folder


def test_demo_writes_patches_pictures_and_a_report(demo: Path):
    report = json.loads((demo / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, REPORT)
    assert sorted(one["category"] for one in report["concepts"]) == ["identity", "object", "style"]
    patches = {one["patch"] for one in report["concepts"]}
    assert {path.name for path in demo.iterdir()} == patches | {
        *("before_after.png", "report.json", "forgetting.html", "forgetting.json"),
    }
    model = load()
    for one in report["concepts"]:
        patch = load_patch(demo / one["patch"], model.survey)
        patch.check_fits(model.survey)
        request = ForgetRequest.from_json(patch.metadata["forget_concept.request"])
        assert [c.name for c in request.concepts] == [one["concept"]]
        assert patch.metadata["forget_concept.base_model"] == model.model_hash


def test_demo_really_forgets_and_keeps(demo: Path):
    """Few pictures, so wide margins; the figures themselves come from `evaluate` at 200 a cell."""
    for one in json.loads((demo / "report.json").read_text(encoding="utf-8"))["concepts"]:
        assert one["ua"] >= 0.6, one
        assert min(one["ira"], one["cra"]) >= 0.6, one


def test_the_picture_shows_before_and_after(demo: Path):
    from PIL import Image

    with Image.open(demo / "before_after.png") as image:
        assert image.format == "PNG"
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 1000


def test_forget_and_generate_fit_together(tmp_path: Path, capsys):
    patch, picture = tmp_path / "p.safetensors", tmp_path / "x.png"
    asked = ["--concept", "umbrella", "--replacement", "circle", "--preserve", "star", "--out", str(patch), "--json"]
    assert cli.main(["forget", *asked]) == 0
    assert json.loads(capsys.readouterr().out)["request"]["concepts"][0]["kind"] == "object"
    drawn = ["--prompt", "a red umbrella", "--steps", "4", "--out", str(picture), "--json"]
    assert cli.main(["generate", *drawn, "--patch", str(patch)]) == 0
    from PIL import Image

    with Image.open(picture) as image:
        assert image.size == (128, 128)
    assert cli.main(["inspect", str(patch), "--model", "mini", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.split("\n}\n", 1)[1])["fit"]["same_base"] is True


def test_the_probe_and_seeds_make_the_same_figures_again(tmp_path: Path, capsys):
    patch = tmp_path / "p.safetensors"
    assert cli.main(["forget", "--concept", "star", "--out", str(patch)]) == 0
    figures, drift = [], []
    for batch in ("4", "16"):
        args = ["--patch", str(patch), "--count", "4", "--steps", "6", "--batch", batch, "--precision", "float32"]
        capsys.readouterr()
        assert cli.main(["evaluate", *args, "--no-baselines", "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out)["concepts"])
        drift.append([one.pop("drift") for one in figures[-1]])
    assert figures[0] == figures[1]
    # batches of other sizes are summed in another order, and a pixel may be rounded the other way
    assert drift[0] == [pytest.approx(one, rel=1e-4) for one in drift[1]]


@pytest.mark.long
def test_the_shipped_model_draws_what_it_is_asked_for(capsys):
    assert cli.main(["mini-table", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["prompts"] >= 500
    assert table["steps"] <= 30
    for category in ("object", "style", "identity"):
        assert table["accuracy"][category]["value"] >= 0.95, (category, table["weakest"][category])


def test_export_is_the_same_model_in_the_original_layout(tmp_path: Path):
    """Read back, text encoder by its folder and UNet by the original names: every weight is the same."""
    import torch
    import yaml
    from transformers import CLIPTextModel, CLIPTokenizer

    from forget_concept.core.mini import load_modules

    assert cli.main(["export", "--out", str(tmp_path / "models")]) == 0
    found = {path.name for path in (tmp_path / "models").iterdir()}
    assert found == {"forget-concept-mini.safetensors", "forget-concept-mini.yaml", "forget-concept-mini-text"}
    tree = yaml.safe_load((tmp_path / "models" / "forget-concept-mini.yaml").read_text(encoding="utf-8"))
    text_folder = tree["model"]["params"]["cond_stage_config"]["params"]["version"]
    unet, text, tokenizer, _ = load_modules()
    ids = tokenizer(["a neon picture of a red star"], padding="max_length", return_tensors="pt").input_ids
    again = CLIPTokenizer.from_pretrained(text_folder)(
        ["a neon picture of a red star"], padding="max_length", return_tensors="pt"
    ).input_ids
    assert torch.equal(ids, again)
    encoder = CLIPTextModel.from_pretrained(text_folder).float().eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids)[0], text(ids)[0])
    from forget_concept.core.files.safetensors_io import read_safetensors

    state, _ = read_safetensors(tmp_path / "models" / "forget-concept-mini.safetensors")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    read = convert_ldm_unet_checkpoint(state, dict(unet.config))
    for name, tensor in unet.state_dict().items():
        assert torch.equal(read[name].float(), tensor), name
