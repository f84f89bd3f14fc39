"""The technique for eval-unlearn: its pictures are the library's, and the suite's own runner finds and runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from forget_concept.core.api import fit, load_model
from forget_concept.core.errors import RequestError
from forget_concept.core.eval_unlearn import ForgetConceptTechnique
from forget_concept.core.models.images import to_bytes, to_pil

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["a star", "a star beside a house"]
QUICK = {"num_inference_steps": 2, "guidance_scale": 3.0, "device": "cpu"}


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures])


@pytest.fixture(scope="module")
def expected():
    """Pictures with and without the patch, as the library draws them."""
    model = load_model("mini")
    patch = fit(model, "star", replacement="circle")

    def drawn():
        latents = model.sample(PROMPTS, [7, 8], 2, 3.0)
        return pixels(to_pil(picture) for picture in to_bytes(model.decode(latents)))

    plain = drawn()
    with patch.apply(model):
        return plain, drawn(), patch


def test_pictures_are_those_of_the_patched_model(expected, tmp_path):
    plain, patched, patch = expected
    named = ForgetConceptTechnique("mini", erase_concept="star", replacement="circle", **QUICK)
    assert np.array_equal(pixels(named.generate(PROMPTS, seed=7)), patched)
    assert not np.array_equal(plain, patched)
    # a prompt's picture depends on its seed alone, and the model is without the patch between calls
    alone = pixels(named.generate(PROMPTS[1:], seed=8))[0]
    assert np.abs(alone.astype(int) - patched[1]).max() <= 1  # another batch rounds differently
    assert named.generate([]) == []
    patch.save(tmp_path / "no-star.safetensors")
    filed = ForgetConceptTechnique(patch=tmp_path / "no-star.safetensors", erase_concept="Star", **QUICK)
    assert np.array_equal(pixels(filed.generate(PROMPTS, seed=7)), patched)
    asked = {"schema": 1, "concepts": [{"name": "star", "kind": "object", "replacement": "circle"}]}
    (tmp_path / "request.json").write_text(json.dumps(asked), encoding="utf-8")
    for request in (asked, tmp_path / "request.json"):
        technique = ForgetConceptTechnique(request=request, **QUICK)
        assert np.array_equal(pixels(technique.generate(PROMPTS, seed=7)), patched)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "give 'erase_concept'"),
        ({"request": {}, "patch": "p.safetensors"}, "one of them"),
        ({"patch": "p.safetensors", "method": "uce"}, "leave 'method' out"),
        ({"erase_concept": "star", "use_fp16": True}, "no option 'use_fp16'"),
        ({"erase_concept": "star", "dtype": "int8"}, "dtype 'int8'"),
        ({"request": "nowhere.json"}, "There is no file 'nowhere.json'"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, words):
    with pytest.raises(RequestError, match=words):
        ForgetConceptTechnique(**{**QUICK, **arguments})


def test_eval_unlearn_finds_and_runs_it(expected, tmp_path, monkeypatch):
    runners = pytest.importorskip(
        "eval_unlearn.runners.single_benchmark_runner", reason="eval-unlearn is not installed"
    )
    from eval_unlearn.registry import get_technique, register_metric
    from eval_unlearn.types import Dataset, MetricResult

    # the entry point as the package states it, whatever version of it is installed here
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((group, points),) = project["entry-points"].items()
    described = tmp_path / "site" / "stated-1.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: stated\nVersion: 1\n")
    lines = [f"[{group}]", *(f"{name} = {place}" for name, place in points.items())]
    (described / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(described.parent))

    @register_metric("brightness")
    class Brightness:
        """A stub: the mean of all pixels."""

        def __init__(self):
            self.seen = []

        def load_dataset(self):
            return [Dataset(PROMPTS, {"source": "two prompts"})]

        def update(self, images, prompts, metadata):
            self.seen.append(pixels(images))

        def compute(self):
            return MetricResult("brightness", float(np.concatenate(self.seen).mean()))

    settings = {"erase_concept": "star", "replacement": "circle", **QUICK}
    runner = runners.SingleBenchmarkRunner("forget_concept", "brightness", settings, {}, str(tmp_path / "out"), seed=7)
    assert get_technique("forget_concept") is ForgetConceptTechnique
    report = runner.run()
    assert report["erase_concept"] == "star"
    assert report["metric_result"]["value"] == pytest.approx(expected[1].mean())
    assert report["dataset_metadata"]["total_loaded"] == len(PROMPTS)
    assert list((tmp_path / "out").rglob("*.png"))
