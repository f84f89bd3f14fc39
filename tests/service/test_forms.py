"""A method's settings as the fields of a host's page."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from forget_concept.core.errors import RequestError
from forget_concept.core.methods.registry import all_methods
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.request.settings import resolve_settings
from forget_concept.core.service.forms import (
    ABOUT,
    MethodSettings,
    form_fields,
    presets,
    settings_from_fields,
    settings_of,
    settings_summary,
    with_settings,
)

METHODS = [pytest.param(method, id=name) for name, method in all_methods().items()]


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_has_a_field_in_words_and_within_bounds(method) -> None:
    """A setting that is new, renamed or gone, or a preset outside of a field's bounds, is seen here."""
    found = form_fields(method)
    assert {widget.setting for widget in found} == {field.name for field in dataclasses.fields(method.Settings)}
    assert len({widget.name for widget in found}) == len(found)
    for name in method.presets:
        for widget in form_fields(method, name):
            about = widget.about
            assert about is ABOUT.get(f"{method.id}.{widget.setting}") or about is ABOUT.get(widget.setting), (
                f"'{widget.setting}' of {method.id} has no words in ABOUT"
            )
            if widget.kind in ("whole", "number"):
                assert about.low <= widget.default <= about.high, (name, widget.name)
                # what the page shows of a value has to be the value
                assert widget.kind == "whole" or math.isclose(
                    round(widget.default / about.step) * about.step, widget.default, rel_tol=1e-6, abs_tol=1e-12
                ), (name, widget.name, "is between two steps")
            if widget.kind == "choice":
                assert widget.default in widget.options


def test_no_words_are_left_of_a_setting_that_is_gone() -> None:
    names = {field.name for method in all_methods().values() for field in dataclasses.fields(method.Settings)}
    own = {f"{method.id}.{f.name}" for method in all_methods().values() for f in dataclasses.fields(method.Settings)}
    assert set(ABOUT) <= names | own


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
        settings_of(method, "tuned", presets(method)["tuned"] | changes)
