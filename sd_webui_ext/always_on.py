"""The always-on script: adds patches to every prompt as ``<lora:…>``, and records them in the infotext.

The infotext also names the patches in the model's weights, since a picture depends on them as much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from ..core.errors import ForgetConceptError, listed
from ..core.request.request import MAX_STRENGTH, strength_warning
from ..core.service.patch_store import patch_store_of
from .infotext import read_infotext, write_infotext
from .webui import ExtraNetworkParams, WebUI, refresh_button, scripts

__all__ = ["FIELD", "MISSING", "NAMES", "STRENGTH", "script_of"]

FIELD = "Forget Concept"
MISSING = "Forget Concept missing"
# attributes of a processing object that take the place of the script's arguments: those of an X/Y/Z plot
NAMES, STRENGTH = "forget_concept_names", "forget_concept_strength"
_IN_MODEL = "_forget_concept_in_model"


def script_of(host: WebUI) -> type:
    """Create the script's class for a host: the webui instantiates it without arguments."""

    class ForgetConcept(scripts.Script):
        """Arguments through the API: a list of patch names, and one strength."""

        def title(self) -> str:
            return FIELD

        def show(self, is_img2img: bool) -> Any:
            return scripts.AlwaysVisible

        def ui(self, is_img2img: bool) -> list[Any]:
            def choices() -> dict[str, Any]:
                return {"choices": list(host.prompt_patches())}

            with gr.Accordion(FIELD, open=False, elem_id=self.elem_id("always_on")):
                with gr.Row():
                    names = gr.Dropdown(
                        label="Patches in every picture",
                        multiselect=True,
                        value=[],
                        # gradio 4 otherwise rejects patches that were saved after the page was built
                        allow_custom_value=not gr.__version__.startswith("3."),
                        elem_id=self.elem_id("names"),
                        **choices(),
                    )
                    refresh_button(names, host.refresh_patches, choices, self.elem_id("refresh"))
                strength = gr.Slider(
                    label="Strength", minimum=0, maximum=2, step=0.05, value=1.0, elem_id=self.elem_id("strength")
                )
            self.infotext_fields = [(names, _pasted_names), (strength, _pasted_strength)]
            return [names, strength]

        def process(self, p: Any, names: Any, strength: Any, **arguments: Any) -> None:
            with host.during_picture():
                setattr(p, _IN_MODEL, _in_model(host, p))

        def before_process_batch(self, p: Any, names: Any, strength: Any, **arguments: Any) -> None:
            chosen = _chosen(host, p, names, strength)
            for at, prompt in enumerate(p.prompts):
                # the prompt's own <lora:…> takes precedence
                left = [one for one in chosen if not any(f"<lora:{one[0]}{end}" in prompt for end in ":>")]
                p.prompts[at] = prompt + "".join(f"<lora:{name}:{weight:g}>" for name, weight, _ in left)
            p.extra_generation_params.pop(FIELD, None)
            if entries := _together(host, getattr(p, _IN_MODEL, _InModel()).strengths, chosen):
                p.extra_generation_params[FIELD] = write_infotext(entries)

        def process_batch(self, p: Any, names: Any, strength: Any, **arguments: Any) -> None:
            # the second pass of hires fix has its own prompts
            data = getattr(p, "hr_extra_network_data", None)
            if not getattr(p, "enable_hr", False) or data is None:
                return
            in_prompt = {parameters.items[0] for parameters in data["lora"]}
            for name, weight, _ in _chosen(host, p, names, strength):
                if name not in in_prompt:
                    data["lora"].append(ExtraNetworkParams(items=[name, f"{weight:g}"]))

    def _pasted_names(parameters: Mapping[str, Any]) -> Any:
        if FIELD not in parameters:
            return gr.update()
        known = host.prompt_patches()
        wanted, common = _wanted(host, str(parameters[FIELD]))
        found = [name if common is not None else f"{name}:{weight:g}" for name, weight in wanted.items()]
        return gr.update(value=found, choices=list(dict.fromkeys([*known, *found])))

    def _pasted_strength(parameters: Mapping[str, Any]) -> Any:
        wanted, common = _wanted(host, str(parameters.get(FIELD, "")))
        return gr.update(value=1.0 if common is None else common) if wanted else gr.update()

    return ForgetConcept


def _wanted(host: WebUI, text: str) -> tuple[dict[str, float], float | None]:
    """What an infotext needs beside the patches that are in the model now: strength by name, and the common strength.

    A patch that is in the model at another strength needs the difference.
    """
    by_hash = {entry.shorthash: name for name, entry in host.prompt_patches().items() if entry.shorthash}
    in_model = {one.name: one.strength for one in host.active() if one.in_force}
    known = {*host.prompt_patches(), *in_model}
    wanted: dict[str, float] = {}
    for name, weight, digest in read_infotext(text):
        found = name if name in known else by_hash.get(digest, name)
        wanted[found] = weight - in_model.get(found, 0.0)
    wanted = {name: weight for name, weight in wanted.items() if abs(weight) > 1e-6}
    strengths = set(wanted.values())
    return wanted, strengths.pop() if len(strengths) == 1 else None


@dataclass(frozen=True)
class _InModel:
    """The strengths of the patches in the model's weights, and the names of those that were lost from them."""

    strengths: Mapping[str, float] = field(default_factory=dict)
    lost: Sequence[str] = ()


def _in_model(host: WebUI, p: Any) -> _InModel:
    """The patches in the model's weights for this picture.

    Patches that were lost when the checkpoint was loaded again are applied again where the settings say so, and named
    below the picture otherwise.
    """
    store = patch_store_of(host)
    if store.settings.reapply:
        try:
            for one in store.apply_again_for_picture():
                p.comment(f"{FIELD}: '{one.name}' was applied to the model again at strength {one.strength:g}.")
        except ForgetConceptError as error:
            p.comment(f"{FIELD}: a patch could not be applied to the model again: {error}")
    lost = [one.name for one in store.dropped() if one.same]
    if lost:
        p.comment(
            f"{FIELD}: generated without {listed([repr(name) for name in lost])}: the checkpoint was loaded again "
            "since. Apply it again or leave it out in the tab Forget Concept, under Patches."
        )
    active = store.active()
    return _InModel({one.name: one.strength for one in active if one.in_force}, lost)


def _together(
    host: WebUI, held: Mapping[str, float], chosen: Iterable[tuple[str, float, str]]
) -> list[tuple[str, float, str]]:
    """Name, weight and hash of all patches that a picture has, in the weights or through its prompt."""
    weights = dict(held)
    for name, weight, _ in chosen:
        weights[name] = weights.get(name, 0.0) + weight
    return [(name, weight, _hash(host, name)) for name, weight in weights.items()]


def _hash(host: WebUI, name: str) -> str:
    entry = host.prompt_patches().get(name)
    if entry is None:
        return ""
    entry.read_hash()
    return str(entry.shorthash or "")


def _split(item: str, known: Mapping[str, Any]) -> tuple[str, float | None]:
    """A chosen patch, and its own strength where it is written ``name:strength``."""
    name, colon, number = item.rpartition(":")
    if item in known or not colon:
        return item, None
    try:
        return name, float(number)
    except ValueError:
        return item, None


def _valid(strength: Any) -> bool:
    return isinstance(strength, (int, float)) and not isinstance(strength, bool) and abs(strength) <= MAX_STRENGTH


def _chosen(host: WebUI, p: Any, names: Any, strength: Any) -> list[tuple[str, float, str]]:
    """Name, weight and hash of the patches to add to this picture's prompt.

    Problems are reported below the picture and in its infotext. Raising instead would go unnoticed: the webui swallows
    a script's exceptions and generates the picture anyway.
    """
    given: _InModel = getattr(p, _IN_MODEL, _InModel())
    names, plotted = getattr(p, NAMES, names), getattr(p, STRENGTH, None)
    strength = strength if plotted is None else plotted
    missing = list(given.lost)
    weights: dict[str, float] = {}
    if names is not None and not isinstance(names, (str, list, tuple)):
        p.comment(f"{FIELD}: generated without patches: the patch names must be a list, not {names!r}.")
        missing.append(repr(names))
        names = []
    items = dict.fromkeys([names] if isinstance(names, str) else [str(name) for name in names or []])
    known = host.prompt_patches()
    if any(_split(item, known)[0] not in known for item in items):
        host.refresh_patches()
        known = host.prompt_patches()
    for item in items:
        name, own = _split(item, known)
        weight = strength if own is None or plotted is not None else own
        if not _valid(weight):
            p.comment(
                f"{FIELD}: generated without '{name}': the strength must be a number from -{MAX_STRENGTH:g} to "
                f"{MAX_STRENGTH:g}, not {weight!r}."
            )
            missing.append(name)
        elif name not in known:
            p.comment(
                f"{FIELD}: generated without '{name}': the Lora folder has no such patch, or the built-in Lora "
                "extension is disabled."
            )
            missing.append(name)
        else:
            if warning := strength_warning(float(weight)):
                p.comment(f"{FIELD}: '{name}': {warning}")
            weights[name] = weights.get(name, 0.0) + float(weight)
    if plotted is not None:
        # a plot's strength is that of the whole, of which the weights hold a part already
        weights |= {name: float(plotted) - held for name, held in given.strengths.items() if name in known}
    p.extra_generation_params.pop(MISSING, None)
    if missing:
        p.extra_generation_params[MISSING] = ", ".join(missing)
    return [(name, weight, _hash(host, name)) for name, weight in weights.items() if weight or plotted is None]
