"""A whole request as JSON: the same patch as from the boxes and from the command line, and back out of a patch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from comfyhost import ComfyUI, ExecutionError
from graphs import base, forget, node
from tiny import fit

from forget_concept.core import mini
from forget_concept.core.formats import load_patch
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

REQUEST = ForgetRequest((Concept("star", "object", "circle"), Concept("neon", "style", "sketch")), ("moon",), seed=3)
BOXES = {"concept": "star -> circle\nneon (style)", "replacement": "sketch", "preserve": "moon", "seed": 3}


def by_request(text: Any, **more: Any) -> dict[str, Any]:
    return node("ForgetConceptByRequest", model=["load", 0], clip=["load", 1], request=text, **more)


def saved(comfyui: ComfyUI, graph: dict[str, Any], *sources: str) -> list[Path]:
    """The files of the patches that these nodes of a graph give."""
    saves = {
        f"save-{source}": node("ForgetConceptSavePatch", lora=[source, 1], filename=source, precision="float32")
        for source in sources
    }
    comfyui.run(graph | saves)
    folder = comfyui.folder / "models" / "loras"
    return [max(folder.rglob(f"{source}*.safetensors"), key=lambda path: path.stat().st_mtime_ns) for source in sources]


def greatest_difference(one: Patch, other: Patch) -> float:
    """Of the changes of any weight, against the greatest change."""
    assert set(one.factors) == set(other.factors)
    apart = max(float((one.factors[key].delta() - other.factors[key].delta()).abs().max()) for key in one.factors)
    return apart / one.max_abs()


def test_a_request_gives_the_patch_of_the_boxes_and_of_the_command_line(comfyui: ComfyUI) -> None:
    graph = base() | {"boxed": forget(**BOXES), "asked": by_request(REQUEST.to_json())}
    boxed, asked = (load_patch(path) for path in saved(comfyui, graph, "boxed", "asked"))
    assert greatest_difference(asked, boxed) == 0
    model = mini.load()
    here = fit(model, REQUEST)
    survey = model.survey
    there = load_patch(saved(comfyui, graph, "asked")[0], survey)
    # the host reads the words in fp32 as we do, by other kernels
    assert greatest_difference(there, here) < 1e-3


def test_the_request_of_a_patch_can_be_taken_out_and_asked_again(comfyui: ComfyUI) -> None:
    graph = base() | {
        "first": by_request(REQUEST.to_json()),
        "look": node("ForgetConceptInspectPatch", lora=["first", 1]),
        "text": node("PreviewAny", source=["look", 1]),
        "again": by_request(["look", 1]),
    }
    entry = comfyui.run(graph | {"words": node("PreviewAny", source=["again", 2])})
    assert ForgetRequest.from_json(entry["outputs"]["text"]["text"][0]) == REQUEST
    first, again = (load_patch(path) for path in saved(comfyui, graph, "first", "again"))
    assert greatest_difference(again, first) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "The input 'request' is empty"),
        ('{"schema": 1,', "not valid JSON"),
        ('{"schema": 1, "concepts": [{"name": "star"}], "strenght": 2}', "strenght"),
        ('{"schema": 1, "concepts": [{"name": "star"}], "method": "nothing"}', "nothing"),
        (
            dataclasses.replace(REQUEST, concepts=(Concept("star", images=("a.png",)),)).to_json(),
            "this node reads no files",
        ),
    ],
)
def test_what_is_no_request_is_a_red_node_in_words(comfyui: ComfyUI, text: str, words: str) -> None:
    graph = base() | {"forget": by_request(text), "words": node("PreviewAny", source=["forget", 2])}
    with pytest.raises(ExecutionError, match=words):
        comfyui.run(graph)
