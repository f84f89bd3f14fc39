"""A method's settings as the fields of a host's page."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from forget_concept.core.errors import RequestError
from forget_concept.core.methods.registry import all_methods
from forget_concept.core.models.model_survey import PROJECTIONS
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.request.settings import resolve_settings
from forget_concept.core.service.forms import (
    MethodSettings,
    form_fields,
    presets,
    settings_from_fields,
    settings_of,
    settings_summary,
    with_settings,
)
from forget_concept.core.service.options import options

METHODS = [pytest.param(method, id=name) for name, method in all_methods().items()]


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_has_a_field_within_its_bounds(method) -> None:
    found = form_fields(method)
    assert {field.setting for field in found} == {field.name for field in dataclasses.fields(method.Settings)}
    assert len({field.name for field in found}) == len(found)
    for name in method.presets:
        for field in form_fields(method, name):
            info = field.info
            assert info.help.endswith(".") and field.help.endswith(info.help)
            if info.numeric:
                assert info.low <= field.default <= info.high, (name, field.name)
                # what the page shows of a value has to be the value
                assert field.kind == "whole" or math.isclose(
                    round(field.default / info.step) * info.step, field.default, rel_tol=1e-6, abs_tol=1e-12
                ), (name, field.name, "is between two steps")
            if field.kind == "choice":
                assert field.default in field.options


def test_leading_settings_come_first_and_a_methods_own_before_those_it_inherits() -> None:
    """Saved workflows know a settings node's widgets by their order."""
    names = [field.name for field in form_fields(all_methods()["selective_amnesia"])]
    assert names[:5] == ["steps", "lr", "rank", "surrogate", "replay_images"]
    # declared anew, for its help alone: it keeps its place among the inherited ones
    assert names[-2:] == ["preserve_weight", "earlier_weight"]
    assert [name for name in names if name.startswith("train_")] == [f"train_{one}" for one in PROJECTIONS]


@pytest.mark.parametrize("method", METHODS)
def test_the_fields_of_a_preset_mean_the_preset(method) -> None:
    for name, values in presets(method).items():
        meant = settings_from_fields(method, json.loads(json.dumps(values)))
        resolved = resolve_settings(method, name, meant)
        assert dataclasses.asdict(resolved) == dataclasses.asdict(method.presets[name]) | {
            key: value for key, value in meant.items() if isinstance(value, tuple)
        }
        settings = settings_of(method, name, values)
        assert settings == MethodSettings(method.id, name, {})
        assert settings_summary(settings, method).endswith("as it is.")


def test_what_differs_from_the_preset_is_what_a_request_gets() -> None:
    method = all_methods()["forget_me_not"]
    values = presets(method)["tuned"] | {
        "rank": 0,
        "train_to_k": False,
        "templates": "a {} there\n\n  {} here ",
        "guidance": 3.5,
        "preserve_weight": 0.0,
    }
    settings = settings_of(method, "tuned", values)
    assert settings.values == {
        "rank": None,
        "train": ("to_v",),
        "templates": ("a {} there", "{} here"),
        "guidance": 3.5,
        "preserve_weight": 0.0,
    }
    request = with_settings(ForgetRequest((Concept("star"),), settings={"rank": 2}), settings)
    assert (request.method, request.preset) == ("forget_me_not", "tuned")
    assert dict(request.settings) == dict(settings.values) | {"rank": 2}
    request.check()
    assert "rank: 8 → none" in settings_summary(settings, method)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("uce", {"projections_to_k": False, "projections_to_v": False}, "'projections'"),
        ("uce", {"templates": "no place"}, "exactly one"),
        ("forget_me_not", {"wanted": "a bat\na bat"}, "twice"),
        ("selective_amnesia", {"latents": "images"}, "'surrogate'"),
        ("duge", {"train_to_k": False, "train_to_v": False, "project": 0.5}, "'train'"),
    ],
)
def test_fields_that_cannot_be_say_why(name: str, changes: dict, words: str) -> None:
    method = all_methods()[name]
    with pytest.raises(RequestError, match=words):
        found = settings_of(method, "tuned", presets(method)["tuned"] | changes)
        resolve_settings(method, found.preset, found.values)


def test_the_settings_page_offers_presets_that_every_method_has() -> None:
    (preset,) = [option for option in options() if option.key.endswith("_preset")]
    assert {"published", "tuned"} <= set(preset.choices)
    for method in all_methods().values():
        assert set(preset.choices) <= set(method.presets), method.id
