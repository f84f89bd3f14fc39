"""A method is one file: dropped into core/methods, with nothing else edited, it is in every front and shared test.

The parts run on a copy of the package with such a file in it, in processes of their own.
"""

from __future__ import annotations

import filecmp
import json
import re
from pathlib import Path
from typing import Any

import pytest
from overlay import ROOT, WEIGHTS, overlay, python

# a leading setting, then the method's own; what it inherits follows
FORM = ["rank", "dial", "rounds", "flavour", "corners_north", "corners_south"]
NODE = "ForgetConceptThrowawaySettings"
GENERATED = {
    "docs/architecture.md",
    f"web/docs/{NODE}.md",
    "locales/en/nodeDefs.json",
    "locales/zh/nodeDefs.json",
    "locales/zh/texts.json",
}
# files whose tests run on every method there is
SHARED = (
    "cli/test_cli.py",
    "cli/test_forget.py",
    "methods/test_methods.py",
    "nodes/test_generated.py",
    "service/test_forms.py",
    "service/test_page_form.py",
)

# everything in one process: importing torch takes longest. It prints one JSON object
FRONTS = """
import contextlib, dataclasses, io, json, sys, types
from pathlib import Path

found = {}

def run(name, main, *args):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(args))
    found[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}

from forget_concept.nodes import generate
run("check before", generate.main, "--check")
run("generate", generate.main)
run("check after", generate.main, "--check")

from forget_concept.core import cli
forget = ("forget", "--model", "mini", "--concept", "star", "--method", "throwaway")
run("methods", cli.main, "methods")
run("methods --json", cli.main, "methods", "--json")
run("methods throwaway", cli.main, "methods", "throwaway")
run("forget", cli.main, *forget, "--set", "dial=2", "--out", sys.argv[1] + "/p.safetensors", "--json")
run("refused", cli.main, *forget, "--set", "dial=2.5")

class Component:
    # a part of a page that only knows what it was made of
    def __init__(self, *args, **given):
        self.args, self.given, self.elem_id = args, given, given.get("elem_id")
    def change(self, *args, **given):
        return None
    def __enter__(self):
        return self
    def __exit__(self, *error):
        return None

class Gradio(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Component,), {})

sys.modules["gradio"] = Gradio("gradio")
from fakewebui import FakeWebui
from fastapi import FastAPI
from fastapi.testclient import TestClient
from forget_concept.core.service.options import options
from forget_concept.core.service.patch_store import patch_store_of
from forget_concept.sd_webui_ext.api import PREFIX, mount
from forget_concept.sd_webui_ext.tab_forget import ForgetPart

host = FakeWebui(None, Path(sys.argv[1]))
app = FastAPI()
mount(app, host, None)
found["rest"] = TestClient(app).get(PREFIX + "/methods").json()
part = ForgetPart(patch_store_of(host))
found["tab"] = [[type(one).__name__, one.given["elem_id"], one.given["value"]] for one in part.fields["throwaway"]]
found["titles"] = list(part.titles)
found["options"] = {one.key: one.choices for one in options()}

from forget_concept.nodes.declared import declared_nodes
found["nodes"] = {name: [dataclasses.asdict(one) for one in node.inputs] for name, node in declared_nodes().items()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return overlay(tmp_path_factory.mktemp("overlay"))


@pytest.fixture(scope="module")
def fronts(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every front says; ``make generated`` has run by then."""
    return json.loads(python(root, "-c", FRONTS, str(tmp_path_factory.mktemp("out"))))


def test_one_command_writes_its_help_and_locales_and_nothing_else_is_edited(root: Path, fronts: dict) -> None:
    assert fronts["check before"]["code"] == 1
    assert all(name in fronts["check before"]["err"] for name in GENERATED)
    # a text without a translation is listed, not an error
    assert fronts["generate"]["code"] == 0 and "How far the throwaway dial is turned." in fronts["generate"]["out"]
    assert fronts["check after"]["code"] == 0
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    files = {name for name in files if not name.startswith(WEIGHTS.as_posix())}
    other = {name for name in files if not (ROOT / name).is_file() or not filecmp.cmp(root / name, ROOT / name, False)}
    assert other == GENERATED | {"core/methods/throwaway.py"}


def test_the_command_line_lists_explains_and_runs_it(fronts: dict) -> None:
    listed = {one["id"]: one for one in json.loads(fronts["methods --json"]["out"])["methods"]}
    assert listed["throwaway"]["presets"]["tuned"]["dial"] == 0.75
    assert "throwaway: Throwaway (of a test)" in fronts["methods"]["out"]
    explained = fronts["methods throwaway"]["out"]
    assert "--set dial=...  number from 0.25 to 2\n      How far the throwaway dial is turned.\n" in explained
    assert "Odds:\n  --set rounds=...  whole number from 1 to 64 or null\n" in explained
    assert fronts["forget"]["code"] == 0, fronts["forget"]
    told = json.loads(fronts["forget"]["out"])
    assert told["request"]["method"] == "throwaway" and told["rank"] > 0
    assert fronts["refused"]["code"] == 1
    assert "The setting 'dial' must be at most 2, not 2.5." in fronts["refused"]["err"]


def test_the_webuis_interface_form_and_options_have_it(fronts: dict) -> None:
    method = next(one for one in fronts["rest"] if one["id"] == "throwaway")
    settings = {one["name"]: one for one in method["settings"]}
    assert settings["dial"] == {
        "name": "dial",
        "kind": "number",
        "about": "How far the throwaway dial is turned.",
        "default": 0.75,
        "options": [],
        "low": 0.25,
        "high": 2.0,
        "optional": False,
        "advanced": False,
        "group": "method",
    }
    assert (settings["corners"]["kind"], settings["corners"]["options"]) == ("list", ["north", "south"])
    assert settings["rounds"]["optional"] and settings["flavour"]["advanced"]
    assert "Throwaway (of a test)" in fronts["titles"]
    assert "throwaway" in fronts["options"]["forget_concept_method"]
    own = fronts["tab"][: len(FORM)]
    assert [name.removeprefix("forget_concept_throwaway_") for _, name, _ in own] == FORM
    assert [(kind, value) for kind, _, value in own] == [
        ("Number", 0),
        ("Number", 0.75),
        ("Number", 0),
        ("Dropdown", "sweet"),
        ("Checkbox", False),
        ("Checkbox", True),
    ]


def test_comfyuis_nodes_have_it(fronts: dict) -> None:
    (method,) = (one for one in fronts["nodes"]["ForgetConcept"] if one["id"] == "method")
    assert "throwaway" in method["extra_dict"]["options"]
    preset, *inputs = fronts["nodes"][NODE]
    assert (preset["kind"], preset["id"]) == ("Combo", "preset")
    assert preset["extra_dict"]["forget_concept_presets"]["tuned"]["dial"] == 0.75
    assert [one["id"] for one in inputs][: len(FORM)] == FORM
    known = {one["id"]: one for one in inputs}
    assert (known["dial"]["kind"], known["dial"]["tooltip"]) == ("Float", "How far the throwaway dial is turned.")
    assert known["dial"]["extra_dict"] == {"default": 0.75, "min": 0.25, "max": 2, "step": 0.05}
    assert known["rounds"]["extra_dict"] == {"default": 0, "min": 0, "max": 64}
    assert known["flavour"]["extra_dict"] == {"default": "sweet", "options": ["sweet", "sour"], "advanced": True}


@pytest.mark.usefixtures("fronts")
def test_the_help_and_every_locale_have_it(root: Path) -> None:
    page = (root / "web" / "docs" / f"{NODE}.md").read_text(encoding="utf-8")
    assert "| **dial** | How far the throwaway dial is turned. | 0.25 to 2 | 0.5 | 0.75 |\n" in page
    for language in ("en", "zh"):
        texts = json.loads((root / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
        assert texts[NODE]["inputs"]["dial"]["tooltip"] == "How far the throwaway dial is turned."
        assert "throwaway: Throwaway (of a test)" in texts["ForgetConcept"]["inputs"]["method"]["tooltip"]


@pytest.mark.usefixtures("fronts")
def test_the_shared_tests_run_on_it_and_pass(root: Path) -> None:
    # the map of the rooms counts the new file without being edited
    python(root, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_architecture.py", "-k", "map_counts")
    files = [f"tests/{name}" for name in SHARED]
    told = python(root, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", "throwaway", *files)
    passed = re.findall(r"^tests/(\S+?)::(\S*throwaway\S*) PASSED", told, re.MULTILINE)
    assert {file for file, _ in passed} == set(SHARED)
    for preset in ("published", "tuned"):
        assert (
            "methods/test_methods.py",
            f"test_every_method_and_preset_keeps_the_promises[throwaway-{preset}]",
        ) in passed
    assert not re.search(r"\b(skipped|failed|error)", told)
