"""A plan: whoever has one has a request that was checked, with the settings of its method."""

from __future__ import annotations

import dataclasses

import pytest

from forget_concept.core.errors import RequestError
from forget_concept.core.methods.registry import all_methods, get, plan_request
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.plan import Plan
from forget_concept.core.request.request import ForgetRequest

STAR = ForgetRequest((Concept("star", "object", "circle"),), preserve=("moon",))


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_a_plan_has_the_method_and_its_resolved_settings(name):
    method = get(name)
    plan = plan_request(dataclasses.replace(STAR, method=name, preset="published"))
    assert plan.method is method and plan.settings == method.presets["published"]
    number = next(
        f.name for f in dataclasses.fields(method.Settings) if isinstance(getattr(plan.settings, f.name), float)
    )
    value = getattr(plan.settings, number) + 0.25
    changed = plan_request(dataclasses.replace(plan.request, settings={number: value}))
    assert isinstance(changed.settings, method.Settings)
    assert changed.settings == dataclasses.replace(plan.settings, **{number: value})


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ForgetRequest((Concept("star", "object", "a star"),)), "the concept itself"),
        (dataclasses.replace(STAR, preserve=("star",)), "preserve list"),
        (dataclasses.replace(STAR, strength=float("nan")), "strength"),
        (dataclasses.replace(STAR, method="magic"), "'magic' is not known"),
        (dataclasses.replace(STAR, preset="best"), "no preset 'best'"),
        (dataclasses.replace(STAR, settings={"rang": 1}), "no setting 'rang'"),
        (dataclasses.replace(STAR, settings={"ridge": "x"}), "'ridge' must be a number"),
        (ForgetRequest((Concept("star", images=("a.png",)),)), "from words alone.*'star'"),
    ],
)
def test_there_is_no_plan_of_a_request_that_cannot_be_fitted(request_, words):
    with pytest.raises(RequestError, match=words):
        plan_request(request_)
    with pytest.raises(RequestError):
        Plan(request_, get("uce"))


def test_a_plan_of_another_method_than_the_request_names_is_refused():
    with pytest.raises(RequestError, match=r"'uce'.*'duge'"):
        Plan(STAR, get("duge"))


def test_a_plan_stays_as_it_was_checked():
    plan = plan_request(STAR)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.request = dataclasses.replace(STAR, strength=0.5)  # type: ignore[misc]
    again = dataclasses.replace(plan, request=dataclasses.replace(STAR, settings={"ridge": 2.0}))
    assert again.settings.ridge == 2.0 and plan.settings.ridge != 2.0
