"""The always-on script: adds patches to every prompt as ``<lora:…>``, and records them in the infotext."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from ..core.errors import listed
from ..core.request.request import MAX_STRENGTH
from .webui import ExtraNetworkParams, WebUI, refresh_button, scripts

__all__ = ["FIELD", "MISSING", "read_infotext", "script_of", "write_infotext"]

FIELD = "Forget Concept"
MISSING = "Forget Concept missing"
_ENTRY = re.compile(r"\s*(?P<name>[^:]+):(?P<weight>[-+.\deE]+):(?P<hash>[0-9a-f]*)\s*(?:,|$)")


def write_infotext(entries: Sequence[tuple[str, float, str]]) -> str:
    """Format name, weight and hash of each patch for the infotext: ``name:weight:hash, …``."""
    return ", ".join(f"{name}:{weight:g}:{digest}" for name, weight, digest in entries)


def read_infotext(text: str) -> list[tuple[str, float, str]]:
    """Parse the output of :func:`write_infotext`; malformed entries are skipped."""
    return [(match["name"], float(match["weight"]), match["hash"]) for match in _ENTRY.finditer(text)]


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

        def before_process_batch(self, p: Any, names: Any, strength: Any, **arguments: Any) -> None:
            chosen = _chosen(host, p, names, strength)
            for at, prompt in enumerate(p.prompts):
                # the prompt's own <lora:…> takes precedence
                left = [one for one in chosen if not any(f"<lora:{one[0]}{end}" in prompt for end in ":>")]
                p.prompts[at] = prompt + "".join(f"<lora:{name}:{weight:g}>" for name, weight, _ in left)
            p.extra_generation_params.pop(FIELD, None)
            if chosen:
                p.extra_generation_params[FIELD] = write_infotext(chosen)

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
        by_hash = {entry.shorthash: name for name, entry in known.items() if entry.shorthash}
        entries = read_infotext(str(parameters[FIELD]))
        found = [name if name in known else by_hash.get(digest, name) for name, _, digest in entries]
        return gr.update(value=found, choices=list(dict.fromkeys([*known, *found])))

    def _pasted_strength(parameters: Mapping[str, Any]) -> Any:
        entries = read_infotext(str(parameters.get(FIELD, "")))
        return gr.update(value=entries[0][1]) if entries else gr.update()

    return ForgetConcept


def _chosen(host: WebUI, p: Any, names: Any, strength: Any) -> list[tuple[str, float, str]]:
    """Name, weight and hash of the patches for this picture; problems are reported below it and in its infotext.

    Raising instead would go unnoticed: the webui swallows a script's exceptions and generates the picture anyway.
    """
    p.extra_generation_params.pop(MISSING, None)
    if names is not None and not isinstance(names, (str, list, tuple)):
        p.comment(f"{FIELD}: generated without patches: the patch names must be a list, not {names!r}.")
        p.extra_generation_params[MISSING] = repr(names)
        return []
    wanted = list(dict.fromkeys([names] if isinstance(names, str) else [str(name) for name in names or []]))
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if wanted and not (number and abs(strength) <= MAX_STRENGTH):
        p.comment(
            f"{FIELD}: generated without patches: the strength must be a number from -{MAX_STRENGTH:g} to "
            f"{MAX_STRENGTH:g}, not {strength!r}."
        )
        p.extra_generation_params[MISSING] = ", ".join(wanted)
        return []
    known = host.prompt_patches()
    if any(name not in known for name in wanted):
        host.refresh_patches()
        known = host.prompt_patches()
    for name in wanted:
        if name in known:
            known[name].read_hash()
    if missing := [name for name in wanted if name not in known]:
        p.comment(
            f"{FIELD}: generated without {listed(missing)}: the Lora folder has no such patch, or the built-in Lora "
            "extension is disabled."
        )
        p.extra_generation_params[MISSING] = ", ".join(missing)
    return [(name, float(strength), str(known[name].shorthash or "")) for name in wanted if name in known]
