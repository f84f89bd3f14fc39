"""The embedded models of every shape as a real ComfyUI's own objects: the core's networks, and forgotten in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comfyhost import ComfyUI
from graphs import PROMPT, Graph, forget, node
from safetensors.torch import load_file
from test_evaluating import evaluate

from forget_concept.core import mini
from forget_concept.core.mini.files import NAMES

SEED = 5


@pytest.mark.parametrize("name", NAMES)
def test_states_predictions_and_pictures_are_those_of_the_core(comfyui: ComfyUI, name: str) -> None:
    file = f"shapes/{name}.safetensors"
    (comfyui.folder / "output" / "shapes").mkdir(exist_ok=True)
    inputs = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2]}
    graph: Graph = {
        "load": node("ForgetConceptLoadEmbeddedModel", name=name),
        "core": node("ProbeCore", **inputs, prompt=PROMPT, seed=SEED, steps=4, name=file),
    }
    (facts,) = comfyui.run(graph)["outputs"]["core"]["facts"]
    found = load_file(Path(comfyui.folder) / "output" / file)
    model = mini.load(name=name)
    assert (facts["hash"], facts["layer"]) == (model.model_hash, model.text_layer)
    assert facts["ids"] == model.text.token_ids(PROMPT)
    assert facts["words"] == model.text.phrase_ids(PROMPT)
    states = model.text.encode([PROMPT])
    torch.testing.assert_close(found["states"], states.hidden, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        predicted = model.predict_noise(model.initial_noise([SEED]), torch.tensor([500]), states)
    torch.testing.assert_close(found["predicted"], predicted, atol=1e-3, rtol=1e-3)
    latents = model.sample([PROMPT], [SEED], steps=4, guidance=3.0)
    torch.testing.assert_close(found["latents"], latents, atol=2e-2, rtol=2e-2)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in NAMES if name != "mini"])
def test_forgetting_is_measured_by_the_evaluation_node(comfyui: ComfyUI, name: str) -> None:
    graph: Graph = {
        "load": node("ForgetConceptLoadEmbeddedModel", name=name),
        "forget": forget(preserve="moon, house, tree"),
        "evaluate": evaluate(count=8, seed=0, steps=8),
        "file": node("PreviewAny", source=["evaluate", 2]),
    }
    outputs = comfyui.run(graph, 900)["outputs"]
    report = json.loads(Path(outputs["file"]["text"][0]).with_suffix(".json").read_text(encoding="utf-8"))
    scores = {variant: one["ua"]["value"] for variant, one in report["evaluations"][0]["scores"].items()}
    assert scores["patched"] >= 0.75
    assert scores["unedited"] <= 0.5
