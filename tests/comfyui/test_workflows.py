"""The example workflows run to their last node: on the embedded model, for there is no checkpoint here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfyhost import ROOT, ComfyUI
from graphs import Graph, from_workflow
from workflows import BLUEPRINT, CHECKPOINT, blueprint, dumped, examples, to_workflow

EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
# made by version 0.1: a shared workflow must open and run for as long as its nodes exist
EARLIER = sorted((ROOT / "tests" / "data" / "before_0.2").glob("*.workflow.json"))
# trained in a few steps: what is looked at is that everything fits together
QUICK = {
    "steps": 2,
    "n_images": 1,
    "sample_steps": 2,
    "batch_size": 1,
    "replay_images": 1,
    "fisher_samples": 2,
    "fisher_draws": 1,
}
_QUICK_BOXES = QUICK | {f"adjust.{name}": value for name, value in QUICK.items()}
SMALL = {
    "EmptyLatentImage": {"width": 128, "height": 128},
    "KSampler": {"steps": 2, "cfg": 2.5},
    "ForgetConceptEvaluate": {"count": 4, "steps": 6},
    "ForgetConceptAttentionMap": {"steps": 2},
}


def on_the_embedded_model(graph: Graph) -> Graph:
    """The same graph with the embedded model for the checkpoint, in few steps."""
    found: Graph = {}
    for key, part in graph.items():
        kind, inputs = part["class_type"], dict(part["inputs"])
        if kind == "CheckpointLoaderSimple":
            kind, inputs = "ForgetConceptLoadEmbeddedModel", {}
        inputs |= SMALL.get(kind, {})
        if kind.startswith("ForgetConcept"):  # settings nodes, and the settings in Forget Concept itself
            inputs |= {
                name: value
                for name, value in _QUICK_BOXES.items()
                if name in inputs and name not in SMALL.get(kind, ())
            }
        found[key] = {"class_type": kind, "inputs": inputs}
    return found


SCHEMA = json.loads(Path(__file__).with_name("workflow.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_a_workflow_by_the_public_schema(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    known = jsonschema.Draft202012Validator(SCHEMA)
    known.check_schema(SCHEMA)
    workflow = json.loads(path.read_text(encoding="utf-8"))
    assert [error.message for error in known.iter_errors(workflow)] == []
    ends = {(link[0], link[1], link[3]) for link in workflow["links"]}
    numbers = {entry["id"] for entry in workflow["nodes"]}
    assert all(a in numbers and b in numbers for _, a, b in ends), "a link to a node that is not there"
    broken = [
        {**workflow, "links": [link[:5] for link in workflow["links"]]},
        {**workflow, "nodes": [{k: v for k, v in entry.items() if k != "mode"} for entry in workflow["nodes"]]},
        {key: value for key, value in workflow.items() if key != "version"},
    ]
    assert not any(known.is_valid(one) for one in broken), "the schema refuses nothing"


def test_the_files_are_what_is_written_down(comfyui: ComfyUI) -> None:
    """The same files on every host."""
    info = comfyui.get("/object_info")
    found = examples(info)
    assert sorted(found) == [path.stem for path in EXAMPLES]
    for name, example in found.items():
        path = ROOT / "example_workflows" / f"{name}.json"
        assert path.read_text(encoding="utf-8") == dumped(to_workflow(name, example, info)), (
            "make them anew: tests/comfyui/workflows.py <a ComfyUI folder>"
        )
        assert path.with_suffix(".jpg").is_file(), f"{name} has no thumbnail"


def test_the_blueprint_is_in_the_node_library(comfyui: ComfyUI) -> None:
    assert BLUEPRINT.read_text(encoding="utf-8") == dumped(blueprint(comfyui.get("/object_info")))
    if not (comfyui.host / "app" / "subgraph_manager.py").is_file():
        pytest.skip("this ComfyUI knows no blueprints of packs")
    found = comfyui.get("/global_subgraphs")
    (number,) = [key for key, entry in found.items() if entry["info"]["node_pack"].endswith(comfyui.pack_name)]
    assert found[number]["name"] == "Forget Concept"
    assert json.loads(comfyui.get(f"/global_subgraphs/{number}")["data"]) == json.loads(BLUEPRINT.read_text())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_for_a_newcomer_or_says_what_to_download(path: Path) -> None:
    """On the embedded model; the one with a checkpoint names its download and its twin."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    kinds = {entry["type"] for entry in workflow["nodes"]}
    (note,) = [entry["widgets_values"][0] for entry in workflow["nodes"] if entry["type"] == "MarkdownNote"]
    if "CheckpointLoaderSimple" in kinds:
        (loader,) = [entry for entry in workflow["nodes"] if entry["type"] == "CheckpointLoaderSimple"]
        (model,) = loader["properties"]["models"]
        assert (model["name"], model["directory"]) == (CHECKPOINT, "checkpoints")
        assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(CHECKPOINT)
        assert "forget_concept_embedded" in note
    else:
        assert "ForgetConceptLoadEmbeddedModel" in kinds
        assert "Load Checkpoint" in note, "it does not say how to use another model"
    assert len(note) < 700
    assert workflow["extra"]["ds"]["scale"] >= 0.6, "it opens too small to be read on a full-HD page"
    # a file in one of these boxes would have to be made first
    assert not kinds & {"LoraLoaderModelOnly", "LoraLoader", "ForgetConceptLoadPatch", "LoadImage"}


# at most so much of what takes long
LITTLE = {"steps": 6, "count": 4, "replay_images": 8, "fisher_samples": 8, "sample_steps": 4, "n_images": 4}


def brief(graph: Graph) -> Graph:
    """The same graph with less work in its boxes."""
    for part in graph.values():
        for box, most in LITTLE.items():
            value = part["inputs"].get(box)
            if isinstance(value, int) and value > most:
                part["inputs"][box] = most
    return graph


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_runs_to_its_last_node(comfyui: ComfyUI, path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    offered = [names for names in comfyui.get("/api/workflow_templates").values() if path.stem in names]
    assert offered, "the host does not offer it"
    graph = brief(on_the_embedded_model(from_workflow(workflow, comfyui.get("/object_info"))))
    # pictures of their own: an example that draws what another one has drawn would find them in the cache, unsaved
    for part in graph.values():
        if part["class_type"] == "SaveImage":
            part["inputs"]["filename_prefix"] = path.stem
    entry = comfyui.run(graph)
    assert entry["status"]["status_str"] == "success"
    ends = {key for key in graph if not any([key, i] in p["inputs"].values() for p in graph.values() for i in range(4))}
    assert ends <= set(entry["outputs"]) | comfyui.cached(entry)
    pictures = [comfyui.image(entry, key) for key, part in graph.items() if part["class_type"] == "SaveImage"]
    assert len(pictures) == 2 and pictures[0] != pictures[1], "the picture is the same with the patch"


@pytest.mark.parametrize("path", EARLIER, ids=lambda path: path.stem)
def test_a_workflow_of_an_earlier_version_runs(comfyui: ComfyUI, path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    graph = on_the_embedded_model(from_workflow(workflow, comfyui.get("/object_info")))
    assert comfyui.run(graph)["status"]["status_str"] == "success"
