"""A method's settings as fields that a person fills in, and those fields as settings: the same in every host.

The fields are those of the method's ``Settings``; :data:`ABOUT` adds only what a dataclass cannot say: words, bounds
and, where a setting may be nothing, the value that means so.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

from ..errors import RequestError, listed
from ..methods.base import Method
from ..models.unet import PROJECTIONS
from ..request.request import ForgetRequest
from ..request.settings import resolve_settings

__all__ = [
    "ABOUT",
    "About",
    "FormField",
    "MethodSettings",
    "form_fields",
    "form_values",
    "presets",
    "settings_from_fields",
    "settings_of",
    "settings_summary",
    "with_settings",
]

Kind = Literal["whole", "number", "choice", "switch", "line", "lines"]


@dataclass(frozen=True)
class About:
    """What a person is told of a setting; ``low``, ``high``, ``step`` are for numbers.

    ``nothing``: the value of the field that stands for no value. ``rare``: shown only where asked for.
    """

    words: str
    low: float = 0
    high: float = 1000
    step: float = 0.01
    nothing: float | None = None
    rare: bool = False


_KEPT = "How much weight keeping has"
# a key with a method's id before it holds for that method alone
ABOUT: Mapping[str, About] = {
    # of the closed form
    "columns": About(
        "tail: every position from the concept's first token on. last: its last token only, as published."
    ),
    "projections": About("Which projections of the text are changed.", rare=True),
    "erase_weight": About("Weight of one text state that is to be forgotten.", 0.01, 1000, 0.05),
    "uce.preserve_weight": About("Weight of one text state that is to be kept.", 0, 1000, 0.05),
    "ridge": About("Holds everything where it is: more changes less.", 0.0001, 1000, 0.01),
    "uce.contexts": About("Forget the concept beside colours, styles and backgrounds too, not only alone."),
    "keep_common": About("Keep everyday words too, beside the preserve list."),
    "uce.rank": About("Highest rank of the patch; 0: as high as the tolerance makes it.", 0, 1024, 1, nothing=0),
    "tolerance": About("What is smaller than this, relative to the greatest part, is cut off.", 0, 0.999, 1e-6),
    "templates": About("Prompts with {} in the concept's place, one a line; empty: the kind's own.", rare=True),
    "preserve_prompts": About("Whole prompts to keep, one a line."),
    "no_replacement": About(
        "What a concept without a replacement reads as. dropped: the same prompt without it. empty: the empty prompt."
    ),
    "neutral_object": About("What an object without a replacement reads as; empty: as no_replacement says.", rare=True),
    "neutral_style": About("What a style without a replacement reads as; empty: as no_replacement says.", rare=True),
    "neutral_identity": About(
        "What a person without a replacement reads as; empty: as no_replacement says.", rare=True
    ),
    # of every training
    "steps": About("Training steps.", 1, 100000, 1),
    "lr": About("Learning rate.", 1e-7, 1, 1e-7),
    "weight_decay": About("Pulls the change back to the model as it was.", 0, 10, 0.001, rare=True),
    "batch_size": About("Pictures in one step: more takes more memory.", 1, 256, 1),
    "clip_norm": About("Bound of the gradient's norm; 0: none.", 0, 1000, 0.1, nothing=0, rare=True),
    "optimiser": About("How a step is made of a gradient.", rare=True),
    "gradient": About(
        "sum: forgetting and keeping are added up. restricted: neither may undo the other. restricted_step: the step "
        "that is made may not either, and is halved where it would."
    ),
    "alpha": About("With restricted: how much forgetting weighs against keeping.", 0.001, 1000, 0.05, rare=True),
    "train": About("Which projections of every cross-attention are trained."),
    "rank": About("Rank of the trained LoRA; 0: dense, which takes far more memory.", 0, 1024, 1, nothing=0),
    "max_rank": About("Bound of the finished patch's rank; 0: none.", 0, 4096, 1, nothing=0, rare=True),
    "latents": About(
        "Which pictures are trained on. generated: the model's own. images: your reference pictures. zeros: none."
    ),
    "n_images": About("Pictures of each concept that the model makes for it.", 1, 1000, 1),
    "sample_steps": About("Steps of the pictures that the model makes.", 1, 1000, 1),
    "guidance": About(
        "Guidance of the pictures that the model makes; 0: the model's usual one.", 0, 100, 0.1, nothing=0, rare=True
    ),
    "one_template": About("Say the concept in the first prompt of its kind only.", rare=True),
    "contexts": About("Say the concept beside colours, styles and backgrounds too, not only alone."),
    "diverse": About("That many written prompts of each concept instead of the templates; 0: none.", 0, 10000, 1),
    "grammar": About("What diverse prompts are written of: general, or the embedded model's words.", rare=True),
    "forget_prompts": About("Your own prompts to forget, one a line; each must name the concept.", rare=True),
    "retain_prompts": About("Your own prompts to keep, one a line.", rare=True),
    "include_end": About("Count the end of the text as the concept's token too.", rare=True),
    "preserve_weight": About(f"{_KEPT} (what the base model predicts for kept prompts).", 0, 1000, 0.1),
    "earlier_weight": About(f"{_KEPT} for what earlier requests of a sequence forgot.", 0, 1000, 0.1),
    # of Forget-Me-Not
    "attention_weight": About("Weight of turning attention away from the concept.", 0, 1000, 0.1),
    "steer_weight": About(
        "Weight of steering the concept to its replacement, or to the prompt without it.", 0, 1000, 0.1
    ),
    "scope": About(
        "cross_attention: where the text is read. unet: self-attention and feed-forward layers too.", rare=True
    ),
    "concept_source": About("name: the concept as it is said. inversion: vectors learned from your pictures of it."),
    "tokens": About("Vectors that inversion learns.", 1, 64, 1, rare=True),
    "inversion_steps": About("Steps of inversion.", 1, 100000, 1, rare=True),
    "inversion_lr": About("Learning rate of inversion.", 1e-7, 1, 1e-6, rare=True),
    "unwanted": About("What the name is no longer to show, one phrase a line: wooden bat, for bat.", rare=True),
    "wanted": About("What the name is to show from now on, one phrase a line, each as often.", rare=True),
    "contrast": About("How far beyond the wanted, away from the unwanted, the name is moved.", 0, 100, 0.1, rare=True),
    # of Selective Amnesia
    "surrogate": About(
        "What a concept turns into. prompt: pictures of the replacement. images: those given for it. noise: noise."
    ),
    "replay_images": About("Pictures of what is kept that are shown again.", 1, 10000, 1),
    "selective_amnesia.preserve_weight": About("Weight of the pictures that are shown again.", 0, 1000, 0.1),
    "ewc_weight": About("How firmly weights that matter elsewhere are held.", 0, 1e6, 0.1),
    "ewc_scale": About(
        "Unit of ewc_weight. relative: to the size of the weights. published: the plain sum.", rare=True
    ),
    "fisher": About(
        "How Fisher information is measured. exact: over all time steps. halves, pairs: by drawing.", rare=True
    ),
    "fisher_samples": About("Pictures that Fisher information is measured on.", 1, 100000, 1),
    "fisher_draws": About("Time steps drawn for each half of a picture's estimate.", 1, 1000, 1, rare=True),
    "fisher_prompts": About(
        "What Fisher information is measured on, one prompt a line; empty: everyday words.", rare=True
    ),
    # of DUGE
    "compare": About("What is compared at each place the text is read. outputs, or attention maps."),
    "relative": About("Measure each place relative to its own size."),
    "local": About("Train each place on its own, on inputs recorded once: much faster, less memory."),
    "bank": About("Recorded inputs of each place.", 1, 100000, 1),
    "pixels": About("Pixels of each recorded input.", 1, 100000, 1),
    "unlearn_weight": About("Weight of unlearning.", 0.001, 1000, 0.1),
    "prior_weight": About("Weight of denoising remembered pictures of what is kept.", 0, 1000, 0.1),
    "memory": About("Remembered pictures.", 1, 10000, 1, rare=True),
    "anchor_weight": About("Weight of staying near the base model's weights.", 0, 1e6, 0.1),
    "project": About(
        "Share of the kept text states whose directions K and V may not react to; 0: off.", 0, 1, 0.01, nothing=0
    ),
}


@dataclass(frozen=True)
class FormField:
    """One field: the ``setting`` it is of, its own ``name``, and its value in the preset it starts with.

    A setting that names some of a few things (``train``) has a switch for each, called ``<setting>_<thing>``.
    """

    name: str
    setting: str
    kind: Kind
    default: Any
    about: About
    options: tuple[str, ...] = ()
    thing: str | None = None


@dataclass(frozen=True)
class MethodSettings:
    """What a person has set: a method, the preset it started from, and what differs from that."""

    method: str
    preset: str
    values: Mapping[str, Any]


def _about(method: type[Method], name: str) -> About:
    found = ABOUT.get(f"{method.id}.{name}") or ABOUT.get(name)
    if found is None:
        # a new setting is usable before somebody has found words for it; a test says that they are missing
        return About(f"The setting '{name}' of {method.title}.", -1e6, 1e6)
    return found


def _bare_type(hint: Any) -> Any:
    """The type without ``None``."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _kind(hint: Any) -> Kind:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "choice"
    if origin is tuple:
        return "lines"
    return {bool: "switch", int: "whole", float: "number"}.get(hint, "line")  # type: ignore[return-value]


_FIRST = ("steps", "lr", "rank")
_SWITCHES = {"train": PROJECTIONS, "projections": ("to_k", "to_v")}


def form_fields(method: type[Method], preset: str = "tuned") -> list[FormField]:
    """Every field of a method's settings as ``preset`` has it, in the order of its ``Settings``, its own first."""
    return _widgets(method, method.presets[preset])


def form_values(method: type[Method], preset: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields' values for a preset with single settings in place of its own.

    Raises :class:`RequestError` as :func:`resolve_settings`.
    """
    return {w.name: w.default for w in _widgets(method, resolve_settings(method, preset, overrides))}


def _widgets(method: type[Method], values: Any) -> list[FormField]:
    hints = typing.get_type_hints(method.Settings)
    own = set(getattr(method.Settings, "__annotations__", {}))
    fields = sorted(dataclasses.fields(method.Settings), key=lambda field: field.name not in own)
    # what people reach for first
    fields.sort(key=lambda field: _FIRST.index(field.name) if field.name in _FIRST else len(_FIRST))
    found: list[FormField] = []
    for field in fields:
        about, value = _about(method, field.name), getattr(values, field.name)
        hint = _bare_type(hints[field.name])
        if things := _SWITCHES.get(field.name):
            found += [FormField(f"{field.name}_{t}", field.name, "switch", t in value, about, thing=t) for t in things]
            continue
        kind = _kind(hint)
        options = tuple(str(option) for option in typing.get_args(hint)) if kind == "choice" else ()
        found.append(FormField(field.name, field.name, kind, _shown(kind, value, about), about, options))
    return found


def _shown(kind: Kind, value: Any, about: About) -> Any:
    if kind == "lines":
        return "\n".join(value or ())
    return about.nothing if value is None else value


def _meant(widget: FormField, value: Any, nothing: Any) -> Any:
    """A field's value as the setting's; ``nothing``: what the setting is where no value is given."""
    if widget.kind == "lines":
        lines = tuple(line.strip() for line in str(value).splitlines() if line.strip())
        return lines or nothing
    if widget.about.nothing is not None and value == widget.about.nothing:
        return None
    return value


def settings_from_fields(method: type[Method], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of the method, from its fields by name."""
    hints = typing.get_type_hints(method.Settings)
    values: dict[str, Any] = {}
    for widget in form_fields(method):
        if widget.thing is not None:
            chosen = values.setdefault(widget.setting, ())
            if given[widget.name]:
                values[widget.setting] = (*chosen, widget.thing)
            continue
        nothing = None if type(None) in typing.get_args(hints[widget.setting]) else ()
        values[widget.setting] = _meant(widget, given[widget.name], nothing)
    return values


def settings_of(method: type[Method], preset: str, given: Mapping[str, Any]) -> MethodSettings:
    """A method's fields, looked through. Raises :class:`RequestError` naming the setting that is wrong."""
    if preset not in method.presets:
        raise RequestError(
            f"The method '{method.id}' has no preset '{preset}': choose one of {', '.join(sorted(method.presets))}."
        )
    values = settings_from_fields(method, given)
    resolve_settings(method, preset, values)
    base = method.presets[preset]
    return MethodSettings(
        method.id, preset, {name: value for name, value in values.items() if not _same(value, getattr(base, name))}
    )


def _same(a: Any, b: Any) -> bool:
    # a page keeps a number to so many places
    if isinstance(a, float) and isinstance(b, (int, float)):
        return abs(a - b) <= 1e-9 * max(abs(a), abs(b), 1e-3)
    if isinstance(a, tuple) and isinstance(b, tuple) and set(a) | set(b) <= set(PROJECTIONS):
        return set(a) == set(b)
    return bool(a == b)


def settings_summary(settings: MethodSettings, method: type[Method]) -> str:
    """The settings in words: the method, its preset, and what differs from that."""
    head = f"{method.title}, preset {settings.preset}"
    if not settings.values:
        return f"{head}, as it is."
    base = method.presets[settings.preset]
    changed = [f"{name}: {_spoken(getattr(base, name))} → {_spoken(value)}" for name, value in settings.values.items()]
    return f"{head}, changed: {listed(changed, 12)}."


def _spoken(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return re.sub(r"\s+", " ", listed([str(item) for item in value], 4))
    return f"{value:g}" if isinstance(value, float) else str(value)


def presets(method: type[Method]) -> dict[str, dict[str, Any]]:
    """Every preset's values by field, as the page fills them in."""
    return {name: {widget.name: widget.default for widget in form_fields(method, name)} for name in method.presets}


def with_settings(request: ForgetRequest, settings: MethodSettings) -> ForgetRequest:
    """The request under such settings: their method, preset and values; single ones the request has itself go over."""
    return dataclasses.replace(
        request,
        method=settings.method,
        preset=settings.preset,
        settings={**settings.values, **request.settings},
    )
