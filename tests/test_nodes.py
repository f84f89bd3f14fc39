"""What of the ComfyUI pack can be looked at without a ComfyUI."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import forget_concept
from forget_concept.core.concepts import Concept
from forget_concept.core.errors import RequestError
from forget_concept.nodes.words import request_from_words, split_list

ROOT = Path(forget_concept.__file__).parent


def imported(path: Path) -> set[str]:
    """The top names of every absolute import of a file."""
    names = set()
    for item in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(item, ast.Import):
            names |= {alias.name.split(".")[0] for alias in item.names}
        elif isinstance(item, ast.ImportFrom) and item.level == 0 and item.module:
            names.add(item.module.split(".")[0])
    return names


def test_the_root_imports_neither_a_host_nor_torch() -> None:
    code = (
        "import sys, forget_concept as f; print(sorted({'torch', 'comfy', 'comfy_api', 'server'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_one_file_names_the_host() -> None:
    for path in [*ROOT.glob("*.py"), *(ROOT / "core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]:
        hosts = imported(path) & {"comfy", "server", "folder_paths", "nodes", "execution"}
        assert not hosts or path == ROOT / "nodes" / "host.py", path
        if path.parent != ROOT / "nodes":
            assert "comfy_api" not in imported(path), path


def test_the_page_finds_its_folder() -> None:
    assert (ROOT / forget_concept.WEB_DIRECTORY / "docs" / "ForgetConcept.md").is_file()


def test_the_example_workflow_hangs_together() -> None:
    """As the page's own schema 0.4 wants it: every link has both of its ends, and they know of it."""
    workflow = json.loads((ROOT / "example_workflows" / "forget_concept_embedded.json").read_text(encoding="utf-8"))
    assert workflow["version"] == 0.4
    entries = {entry["id"]: entry for entry in workflow["nodes"]}
    assert workflow["last_node_id"] == max(entries)
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])
    assert sorted(entry["order"] for entry in entries.values()) == list(range(len(entries)))
    for number, source, out, target, into, kind in workflow["links"]:
        assert number in entries[source]["outputs"][out]["links"]
        assert entries[target]["inputs"][into]["link"] == number
        assert kind == entries[source]["outputs"][out]["type"]
        assert entries[source]["order"] < entries[target]["order"]
    counted = sum(len(slot["links"]) for entry in entries.values() for slot in entry["outputs"])
    assert counted == len(workflow["links"])
    kinds = [entry["type"] for entry in entries.values()]
    assert {"ForgetConcept", "ForgetConceptLoadEmbeddedModel"} <= set(kinds)
    assert kinds.count("SaveImage") == 2


def test_lists_are_by_commas_or_lines() -> None:
    assert split_list(" star,\n Mira Vale ,,\n") == ["star", "Mira Vale"]
    assert split_list("") == []


def test_boxes_make_a_request() -> None:
    request = request_from_words(
        "star\nmoon", "object", "circle", "heart, tree", "uce", "published", 0.5, 7, '{"rank": 8}'
    )
    assert request.concepts == (Concept("star", "object", "circle"), Concept("moon", "object", "circle"))
    assert request.preserve == ("heart", "tree")
    assert (request.method, request.preset, request.strength, request.seed) == ("uce", "published", 0.5, 7)
    assert dict(request.settings) == {"rank": 8}
    assert request_from_words("star").concepts == (Concept("star"),)
    each = request_from_words("star, moon", replacement="circle, heart").concepts
    assert [concept.replacement for concept in each] == ["circle", "heart"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"concept": "  \n, "}, "The concept is empty"),
        ({"concept": "a, b, c", "replacement": "d, e"}, "3 concepts and 2 replacements"),
        ({"concept": "star", "replacement": "STAR"}, "the concept itself"),
        ({"concept": "star", "preserve": "moon, star"}, "preserve list"),
        ({"concept": "star", "settings": "[1]"}, "must be a JSON object"),
        ({"concept": "star", "settings": "{"}, "not JSON"),
        ({"concept": "star", "settings": "[" * 100000}, "not JSON"),
        ({"concept": "star", "strength": float("nan")}, "strength"),
    ],
)
def test_boxes_that_make_none_say_why(words: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        request_from_words(**words)
