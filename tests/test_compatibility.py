"""Requests, patches and workflows made by version 0.1, before the modules were moved, still load and mean the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from forget_concept.core import cli
from forget_concept.core.formats import context_map, load_patch
from forget_concept.core.methods.sequence import History
from forget_concept.core.models.text_entries import TOKENS
from forget_concept.core.request.request import ForgetRequest

OLD = Path(__file__).with_name("data") / "before_0.2"
ROOT = Path(__file__).resolve().parent.parent
NODES = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(OLD.glob("*.request.json")), ids=lambda path: path.stem)
def test_a_request_reads_and_writes_as_before(path: Path) -> None:
    request = ForgetRequest.from_file(path)
    given = json.loads(path.read_text(encoding="utf-8"))
    written = json.loads(request.to_json())
    assert {key: written[key] for key in given} == given
    assert ForgetRequest.from_json(request.to_json()) == request


def test_a_patch_says_what_made_it() -> None:
    patch = load_patch(OLD / "trained.safetensors")
    history = History.from_patch(patch)
    (request,) = history.requests
    assert [(concept.name, concept.kind) for concept in request.concepts] == [("Lena Frost", "identity")]
    assert (request.method, request.settings["steps"]) == ("duge", 2)
    assert patch.metadata["forget_concept.base_name"] == "mini"
    assert (len(patch), patch.rank) == (22, 8)


def test_a_sequence_can_be_inspected_and_taken_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sequence.safetensors"
    shutil.copyfile(OLD / "sequence.safetensors", file)
    assert cli.main(["inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "star" in shown and "neon" in shown
    out = tmp_path / "star.safetensors"
    assert cli.main(["restore", str(file), "--concept", "neon", "--out", str(out), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [one["request"]["concepts"][0]["name"] for one in data["requests"]] == ["star"]
    left = History.from_patch(load_patch(out))
    assert [concept.name for concept in left.concepts] == ["star"]


def test_a_context_map_reads() -> None:
    maps, metadata = context_map.load(OLD / "context_map.safetensors")
    assert maps[TOKENS].shape == (192, 192)
    assert json.loads(metadata["forget_concept.concepts"]) == ["star"]


@pytest.mark.parametrize("path", sorted(OLD.glob("*.workflow.json")), ids=lambda path: path.stem)
def test_a_workflow_names_only_nodes_and_inputs_that_are_there(path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    own = [node for node in workflow["nodes"] if node["type"].startswith("ForgetConcept")]
    assert own
    for node in own:
        known = NODES[node["type"]]
        assert {entry["name"] for entry in node["inputs"]} <= set(known["inputs"])
        assert len(node["outputs"]) <= len(known["outputs"])
