"""An error speaks of the settings of the method at hand: each name that it quotes is one that the person can set."""

from __future__ import annotations

import itertools
import re
import types
import typing
from typing import Any, Literal, Union

import pytest
import torch
from tiny import TinyText, fit, rand, tiny_model

from forget_concept.core.errors import Cancelled, ForgetConceptError
from forget_concept.core.methods import trained
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.registry import all_methods, get
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.request.settings import resolve_settings

SMALL = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
}
# whatever of these a method has: little work
LITTLE = {"steps": 1, "n_images": 1, "sample_steps": 1, "batch_size": 1, "bank": 1, "memory": 1, "replay_images": 1}
LITTLE |= {"fisher_samples": 1, "fisher_draws": 1, "inversion_steps": 1, "keep_common": False, "contexts": False}
# the concept is called so that no setting's name or value is
PLAIN = (Concept("Zebra"),)
REPLACED = (Concept("Zebra", replacement="Horse"),)


def options(hint: Any) -> list[Any]:
    """The words that a setting can be set to."""
    if typing.get_origin(hint) in (Union, types.UnionType, tuple):
        return [option for part in typing.get_args(hint) for option in options(part)]
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else []


def values(hint: Any) -> list[Any]:
    """Values of a setting that are of its type: too small, too large, odd, empty, or just another one."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return [value for part in args for value in values(part)]
    if origin is Literal:
        return list(args)
    if origin is tuple:
        return [(), ("Zebra",), ("to_q",), ("to_k", "to_k"), ("a Zebra {}",), ("{} {}",)]
    return {
        bool: [True, False],
        int: [-1, 0, 3, 7],
        float: [-1.0, 0.0, 0.5, 1.0],
        str: ["", "a Zebra"],
        type(None): [None],
    }[hint]


def hints(method):
    return typing.get_type_hints(method.Settings)


def allowed(method) -> set[str]:
    """What an error may quote in small letters: settings, what they can be set to, and the method's own names."""
    found = {method.id, *method.presets, "to_q", "to_k", "to_v", "to_out"}
    for name, hint in hints(method).items():
        found |= {name, *map(str, options(hint))}
    return found


def quoted(message: str) -> set[str]:
    return set(re.findall(r"'([a-z][a-z0-9_]*)'", message))


def little(method):
    return {name: value for name, value in LITTLE.items() if name in hints(method)}


def begun(*_, **more):
    raise Cancelled


def messages_of(method, model, changed, concepts, inputs):
    """The error of one fit, up to its first step; empty where there is none."""

    try:
        request = ForgetRequest(concepts, ("Cow",), method.id, "tuned", little(method) | changed)
        fit(model, request, inputs=inputs)
    except Cancelled:
        return ""
    except ForgetConceptError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", list(all_methods()))
def test_an_error_names_settings_that_the_method_has(name, monkeypatch):
    method, model = get(name), tiny_model(**SMALL)
    model.text = TinyText(max_length=24)
    # nothing is looked at here but errors, and none is left to come once the training has begun
    monkeypatch.setattr(model, "sample", lambda prompts, *_, **more: torch.zeros(len(prompts), *model.latent_shape))
    monkeypatch.setattr(trained, "train", begun)
    said: dict[str, dict[str, Any]] = {}
    for setting, hint in hints(method).items():
        for value in values(hint):
            for concepts in (PLAIN, REPLACED) if options(hint) else (PLAIN,):
                said.setdefault(messages_of(method, model, {setting: value}, concepts, Inputs()), {setting: value})
    if method.takes_images:
        pictures = Inputs(images={"Zebra": rand(3, 3, 64, 64).clamp(-1, 1)})
        said.setdefault(messages_of(method, model, {}, PLAIN, pictures), {"images": "given"})
    # two settings that do not go together: seen before any work
    plain = resolve_settings(method, "tuned", {})
    changes = [
        {setting: value}
        for setting, hint in hints(method).items()
        for value in values(hint)
        if value != getattr(plain, setting) and not (isinstance(value, tuple) and value)
    ]
    for one, other in itertools.combinations(changes, 2):
        try:
            settings = resolve_settings(method, "tuned", one | other)
            if method.trained:
                request = ForgetRequest(PLAIN, ("Cow",), method.id, "tuned", one | other)
                method()._check_inputs(request, settings, Inputs())
                method().check_request(request, settings, Inputs())
        except ForgetConceptError as error:
            said.setdefault(str(error), one | other)
    said.pop("", None)
    assert len(said) > 5
    wrong = {message: changed for message, changed in said.items() if quoted(message) - allowed(method)}
    assert not wrong


def test_what_keeps_too_much_says_which_setting_to_lower():
    request = ForgetRequest(
        REPLACED, tuple(f"Cow {i}" for i in range(20)), "duge", "tuned", little(get("duge")) | {"project": 1}
    )
    with pytest.raises(ForgetConceptError, match=r"spans all 32 directions.*set 'project' below 1, or preserve fewer"):
        fit(tiny_model(**SMALL), request)
