"""The library's front door: the README's example as written, and every way in."""

from __future__ import annotations

import doctest
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import forget_concept as fc
from forget_concept.core import api
from forget_concept.core.errors import ModelError, PatchError, RequestError
from forget_concept.core.evaluation import SamplingSettings, assess
from forget_concept.core.evaluation.report import Report
from forget_concept.core.mini.files import weights_folder

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("peft", reason="peft is a dependency of the package, and a host may lack it")


@pytest.fixture(scope="module")
def mini():
    return fc.load_model("mini")


@pytest.fixture
def pipe():
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        weights_folder(), variant="fp16", safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def test_the_first_example_of_the_page_runs_as_written(pipe, tmp_path, monkeypatch):
    """The README's own is run by ``test_docs.py``."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    # the example as it stands, with fewer images of fewer steps
    brief = {"count": 4, "sampling": SamplingSettings(steps=5)}
    monkeypatch.setattr(fc, "evaluate", lambda model, patch: api.evaluate(model, patch, **brief))
    (tmp_path / "page.py").write_text(blocks[0], encoding="utf-8")
    names = runpy.run_path("page.py", {"pipe": pipe})
    assert (tmp_path / "no-star.safetensors").is_file()
    assert pipe.get_active_adapters() == ["no-star"]
    assert isinstance(names["report"], Report) and names["report"].evaluations[0].concept == "star"
    scores = names["report"].evaluations[0].scores
    assert scores["patched"].ua.value > scores["unedited"].ua.value


def test_the_root_offers_what_it_lists_and_nothing_of_an_older_interface():
    assert set(fc.__all__) <= set(dir(fc)) and all(hasattr(fc, name) for name in fc.__all__)
    assert fc.fit is api.fit and fc.Patch is api.Patch and re.fullmatch(r"\d+\.\d+\.\d+", fc.__version__)
    # ComfyUI would take the pack for one of its older interface
    for name in ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "torch", "anything"):
        assert not hasattr(fc, name)


# an evaluation as it stands in its docstring takes most of a minute, and the page's example evaluates more briefly
@pytest.mark.parametrize("name", [pytest.param("evaluate", marks=pytest.mark.long), "fit", "load_model", "load_patch"])
def test_the_example_in_the_docstring_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.DocTestFinder().find(getattr(api, name), name, globs={})
    assert any(test.examples for test in found), f"{name} has no example"
    runner = doctest.DocTestRunner()
    for test in found:
        lines: list[str] = []
        runner.run(test, out=lines.append)
        assert not runner.summarize(verbose=False).failed, "".join(lines)


def test_the_page_is_made_from_the_docstrings():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "make_api.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_way_to_name_a_concept_is_the_same_request(mini):
    wanted = fc.fit(mini, "star", replacement="circle", preserve=["moon"], seed=3)
    ways = [
        fc.fit(mini, fc.Concept("star", replacement="circle"), preserve=("moon",), seed=3),
        fc.fit(mini, ["star"], replacement="circle", preserve=["moon"], seed=3),
        fc.fit(mini, fc.ForgetRequest((fc.Concept("star", replacement="circle"),), ("moon",), seed=3)),
    ]
    for patch in ways:
        assert patch.metadata == wanted.metadata
        assert all(torch.equal(patch.factors[key].up, factor.up) for key, factor in wanted.factors.items())
    half = fc.fit(mini, "star", replacement="circle", preserve=["moon"], seed=3, strength=0.5)
    key = next(iter(wanted.factors))
    torch.testing.assert_close(half.factors[key].delta() * 2, wanted.factors[key].delta())


def test_what_is_said_twice_or_makes_no_sense_is_refused(mini):
    request = fc.ForgetRequest((fc.Concept("star"),))
    for argument in ({"kind": "style"}, {"preserve": ["moon"]}, {"seed": 1}, {"strength": 0.5}, {"settings": {"a": 1}}):
        with pytest.raises(RequestError, match=f"leave '{next(iter(argument))}' out"):
            fc.fit(mini, request, **argument)
    with pytest.raises(RequestError, match="leave 'replacement' out"):
        fc.fit(mini, fc.Concept("star"), replacement="circle")
    with pytest.raises(RequestError, match=r"preserve=\['moon'\]"):
        fc.fit(mini, "star", preserve="moon")
    with pytest.raises(RequestError, match="at least one concept"):
        fc.fit(mini, [])
    with pytest.raises(RequestError, match="not a int"):
        fc.fit(mini, [3])
    with pytest.raises(RequestError, match="by name"):
        fc.fit(mini, ["star", "moon"], images=["a.png"])
    with pytest.raises(RequestError, match="not among the concepts"):
        fc.fit(mini, "star", images={"moon": ["a.png"]})


def test_images_come_as_tensors_or_as_files(mini, tmp_path):
    from PIL import Image

    size = 8 * mini.latent_shape[1]
    for n in range(3):
        Image.new("RGB", (size, size), (40 * n, 10, 200)).save(tmp_path / f"{n}.png")
    tensors = torch.rand(3, 3, size, size) * 2 - 1
    for images in (tensors, tmp_path, [str(path) for path in sorted(tmp_path.iterdir())], {"star": tensors}):
        # the method works from words alone, and says so: the images reached it
        with pytest.raises(RequestError, match="works from words alone, and images of 'star'"):
            fc.fit(mini, "star", images=images)


def test_a_pipeline_is_a_model_and_a_patch_goes_onto_it(pipe, mini):
    model = fc.load_model(pipe)
    assert model.unet is pipe.unet and model.model_hash == mini.model_hash
    patch = fc.fit(model, "star", replacement="circle")
    states = model.text.encode(["a red star"])
    x, t = model.initial_noise([1]), torch.tensor([500])

    def predicted():
        with torch.no_grad():
            return model.predict_noise(x, t, states)

    base = predicted()
    with patch.apply(model):
        ours = predicted()
    patch.apply(pipe, name="no-star")
    assert float((predicted() - ours).abs().max()) < 1e-5 < float((ours - base).abs().max())
    pipe.delete_adapters("no-star")
    assert torch.equal(predicted(), base)


def test_a_source_that_is_no_model_is_refused(pipe):
    for source, arguments, word in (
        (object(), {}, "is no model"),
        (pipe, {"device": "cpu"}, "leave 'device' out"),
        (pipe, {"config": "x"}, "leave 'config' out"),
        ("mini", {"dtype": torch.float16}, "leave 'dtype' out"),
        ("mini", {"clip_skip": 2}, "clip_skip=2"),
        ("nowhere", {}, "no model 'nowhere'"),
    ):
        with pytest.raises(ModelError, match=word):
            fc.load_model(source, **arguments)


@pytest.mark.parametrize("format", ["kohya", "peft", "context-map"])
def test_a_patch_is_saved_and_loaded_in_every_format(mini, tmp_path, format):
    patch = fc.fit(mini, "star", replacement="circle")
    place = tmp_path / ("patch" if format == "peft" else "patch.safetensors")
    patch.save(place, format=format)
    loaded = fc.load_patch(place, mini)
    assert loaded.about.concepts == ("star",) and set(loaded.factors) == set(patch.factors)
    for key, factor in patch.factors.items():
        torch.testing.assert_close(loaded.factors[key].delta(), factor.delta(), atol=1e-6, rtol=1e-4)
    if format == "context-map":
        with pytest.raises(PatchError, match="needs a model"):
            fc.load_patch(place)


def test_evaluation_needs_to_know_what_to_ask(mini, monkeypatch):
    patch = fc.fit(mini, "star", replacement="circle")
    unnamed = fc.Patch(patch.factors)
    with pytest.raises(RequestError, match="does not state what it forgets"):
        fc.evaluate(mini, unnamed)
    calls = []
    monkeypatch.setattr(assess, "assess", lambda *args, **more: calls.append((args, more)))
    fc.evaluate(mini, [(unnamed, 0.5), patch], seed=3)
    ((model, _, patches, concepts, measures), _), *_ = calls
    assert model is mini and patches == [(unnamed, 0.5), (patch, 1.0)] and concepts == ["star"]
    assert (measures.count, measures.seed, measures.sampling.guidance) == (100, 3, mini.guidance)
    other = fc.load_model(weights_folder())
    with pytest.raises(RequestError, match="name a benchmark"):
        fc.evaluate(other, patch)
