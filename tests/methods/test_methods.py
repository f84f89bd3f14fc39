"""The registry and the front door: what every method must keep to."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from tiny import fit, flags, state_hash

from forget_concept.core.errors import ForgetConceptError, PatchError, RequestError
from forget_concept.core.formats import kohya
from forget_concept.core.methods import registry as methods
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.registry import all_methods, get, register
from forget_concept.core.patch.low_rank import LowRank
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.request.settings import describe_settings, quick_settings, resolve_settings, setting

QUICK = {name: quick_settings(method) for name, method in all_methods().items()}


def test_every_method_in_the_folder_is_there():
    found = all_methods()
    assert list(found) == sorted(found)
    assert {"duge", "forget_me_not", "selective_amnesia", "uce"} <= set(found)
    for name, method in found.items():
        assert get(name) is method and method.id == name and method.title and method.paper.startswith("https://")


@pytest.mark.parametrize("preset", ["published", "tuned"])
@pytest.mark.parametrize("name", list(QUICK))
def test_every_method_and_preset_keeps_the_promises(model, tmp_path, name, preset):
    before, flagged = state_hash(model.unet), flags(model.unet)
    events = []
    request = ForgetRequest(
        (Concept("star"), Concept("watercolour wash", "style")), (), name, preset, QUICK[name], seed=5
    )
    patch = fit(model, request, events.append)
    assert state_hash(model.unet) == before and flags(model.unet) == flagged
    assert events and events[-1].step == events[-1].total
    patch.check_fits(model.survey)
    said = patch.metadata
    assert all(isinstance(v, str) for v in said.values())
    assert ForgetRequest.from_json(said["forget_concept.request"]) == request
    settings = resolve_settings(get(name), preset, QUICK[name])
    assert json.loads(said["forget_concept.settings"]) == json.loads(json.dumps(dataclasses.asdict(settings)))
    for key in ("version", "method", "preset", "seed", "base_model", "family", "text_layer", "architecture"):
        assert said[f"forget_concept.{key}"]
    kohya.save(patch, tmp_path / "p.safetensors")
    loaded = kohya.load(tmp_path / "p.safetensors")
    assert {k: v for k, v in loaded.metadata.items() if k.startswith("forget")} == said
    assert all(torch.equal(f.up, loaded.factors[k].up) for k, f in patch.factors.items())


@dataclasses.dataclass(frozen=True)
class Nothing:
    number: float = setting(1.0, "A number.", minimum=0.5, maximum=10)
    maybe: int | None = setting(None, "A whole number, or none.", minimum=1, maximum=9, none_value=0)
    words: tuple[str, ...] = setting((), "Words.")
    yes: bool = setting(True, "A switch.")
    some: tuple[str, ...] = setting(("a",), "A selection.", choices=("a", "b"))


def make(id_, **extra):
    fields = {"id": id_, "title": "t", "paper": "https://p", "Settings": Nothing, "main": ("number",)}
    return type("M", (), fields | {"presets": {"published": Nothing(), "tuned": Nothing(2.0)}} | extra)


@pytest.fixture()
def registry(monkeypatch):
    all_methods()
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))


def test_duplicates_and_incomplete_methods_are_refused(registry):
    register(make("mine"))
    with pytest.raises(ForgetConceptError, match="Two methods are called 'uce'"):
        register(make("uce"))
    with pytest.raises(ForgetConceptError, match="presets"):
        register(make("other", presets={"tuned": Nothing()}))
    for main in ((), ("unknown",)):
        with pytest.raises(ForgetConceptError, match="must name in 'main'"):
            register(make("other", main=main))
    assert "mine" in all_methods()


def declared(kind, field):
    """A ``Settings`` class with one field."""
    return dataclasses.make_dataclass("Odd", [("odd", kind, field)], frozen=True)


@pytest.mark.parametrize(
    ("kind", "field", "says"),
    [
        (int, 3, "'odd' of Odd has no description"),
        (int, setting(3, "  ", minimum=0, maximum=9), "has no description"),
        (int, setting(3, "A number."), "without bounds"),
        (float, setting(3.0, "A number.", minimum=0), "without bounds"),
        (int | None, setting(3, "A number.", minimum=1, maximum=9), "none_value"),
        (dict, setting(None, "Anything."), "forms do not support"),
        (tuple[int, ...], setting((), "Numbers."), "forms do not support"),
        (int, setting(30, "A number.", minimum=1, maximum=9), "preset 'published'.*at most 9, not 30"),
        (tuple[str, ...], setting(("x",), "Some.", choices=("y",)), "preset 'published'.*one or more of y"),
    ],
)
def test_a_method_whose_settings_do_not_describe_themselves_is_refused(registry, kind, field, says):
    odd = declared(kind, field)
    with pytest.raises(ForgetConceptError, match=says):
        register(make("odd", Settings=odd, presets={"published": odd(), "tuned": odd()}))
    assert "odd" not in all_methods()


@pytest.mark.parametrize("name", list(QUICK))
def test_bounds_hold_however_settings_are_made(name):
    """By the constructor, by a preset with overrides, and for both bounds of every number."""
    method = get(name)
    for info in describe_settings(method.Settings):
        if not info.numeric:
            continue
        below = info.minimum - (1 if info.kind == "whole" else 1e-9)
        above = info.maximum + (1 if info.kind == "whole" else 1e-3)
        for value, says in ((below, "at least"), (above, "at most")):
            with pytest.raises(RequestError, match=f"'{info.name}' must be {says}"):
                dataclasses.replace(method.presets["tuned"], **{info.name: value})
            with pytest.raises(RequestError, match=f"'{info.name}' must be {says}"):
                resolve_settings(method, "tuned", {info.name: value})


def test_settings_are_resolved_and_typed():
    method = make("mine")
    found = resolve_settings(method, "tuned", {"number": 3, "maybe": 2.0, "words": ["a", "b"], "yes": False})
    assert (
        found == Nothing(3.0, 2, ("a", "b"), False) and isinstance(found.number, float) and isinstance(found.maybe, int)
    )
    assert resolve_settings(method, "tuned", {"maybe": None}).number == 2.0
    for bad in (
        {"number": "x"},
        {"number": None},
        {"number": True},
        {"number": float("inf")},
        {"maybe": 1.5},
        {"maybe": "1"},
        {"words": "a"},
        {"words": [1]},
        {"yes": 1},
        {"yes": "true"},
        {"number": 0.49},
        {"number": 11},
        {"maybe": 0},
        {"maybe": 10},
        {"some": 3},
        {"some": []},
        {"some": ["a", "a"]},
        {"some": ["c"]},
    ):
        with pytest.raises(RequestError, match=f"'{next(iter(bad))}' must (be|name)"):
            resolve_settings(method, "tuned", bad)
    with pytest.raises(RequestError, match="number, maybe, words, yes, some"):
        resolve_settings(method, "tuned", {"nubmer": 1})
    with pytest.raises(RequestError, match="published, tuned"):
        resolve_settings(method, "best", {})


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "changes nothing.*'star'"), (float("nan"), "NaN"), (float("inf"), "NaN or infinite")]
)
def test_an_edit_of_nothing_or_of_nan_is_never_a_success(registry, model, value, words):
    key = model.survey.sites[0].key("to_k")

    def run(self, model, plan, progress=None, inputs=None):
        return Patch({key: LowRank(torch.full((32, 1), value), torch.ones(1, 32))})

    register(make("mine", fit=run))
    with pytest.raises(PatchError, match=words):
        fit(model, ForgetRequest((Concept("star"),), method="mine"))


def test_pictures_for_a_method_that_looks_at_none_are_refused(model):
    given = Inputs(images={"star": torch.zeros(4, 3, 64, 64)})
    with pytest.raises(RequestError, match=r"'uce' works from words alone.*'star'"):
        fit(model, ForgetRequest((Concept("star"),)), inputs=given)


def test_the_core_needs_no_extras():
    """Imported and used with diffusers, transformers, numpy and the rest of the extras out of reach."""
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'diffusers', 'transformers', 'PIL', 'jsonschema', 'rich', 'peft'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from forget_concept.core import api, formats, models, training\n"
        "from forget_concept.core.errors import ModelError\n"
        "from forget_concept.core.methods import fit, registry\n"
        "from forget_concept.core.training import attention, losses, loop\n"
        "assert len(registry.all_methods()) >= 2\n"
        "try:\n"
        "    api.load_model('.')\n"
        "except ModelError as error:\n"
        "    assert 'pip install diffusers' in str(error)\n"
        "else:\n"
        "    sys.exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
