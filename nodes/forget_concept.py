"""The node that makes a model forget."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from comfy_api.latest import io

from ..core.concepts import KINDS, MAX_SEED, MAX_STRENGTH
from ..core.formats import kohya
from ..core.methods import all_methods, fit, get
from . import host
from .words import report, request_from_words

__all__ = ["ForgetConcept"]


class ForgetConcept(io.ComfyNode):
    """Works out a patch on the host's loaded model and gives it as a patched MODEL, as a LORA_MODEL and in words.

    The incoming MODEL is worked on *with* the patches it carries (LoRAs, an earlier Forget Concept): what is forgotten
    is what that very MODEL knows. Without any, the patch belongs to the plain checkpoint. The MODEL that came in stays
    bit-identical, whether the node ends well, with an error or by Cancel.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        methods = all_methods()
        presets = list(dict.fromkeys(name for method in methods.values() for name in method.presets))
        inputs: list[Any] = [
            io.Model.Input("model", tooltip="The model that shall forget: a UNet that reads text by cross-attention."),
            io.Clip.Input("clip", tooltip="The text encoder your prompts go through, after any CLIP Set Last Layer."),
            io.String.Input(
                "concept",
                multiline=True,
                placeholder="star",
                default="",
                dynamic_prompts=False,
                tooltip="What to forget, in the words a prompt would use. Several: one a line, or separated by commas.",
            ),
            io.Combo.Input(
                "kind",
                options=list(KINDS),
                default=KINDS[0],
                tooltip="What the concepts are; it chooses the prompts they are read in.",
            ),
            io.String.Input(
                "replacement",
                default="",
                dynamic_prompts=False,
                tooltip="What to show instead. Empty: nothing in particular. One for all concepts, or one for each.",
            ),
            io.String.Input(
                "preserve",
                multiline=True,
                placeholder="things to keep",
                default="",
                dynamic_prompts=False,
                tooltip="Words that must go on working, such as neighbours of the concept: one a line, or by commas.",
            ),
            io.Combo.Input(
                "method",
                options=list(methods),
                default="uce" if "uce" in methods else next(iter(methods)),
                tooltip="\n".join(f"{name}: {method.title}" for name, method in methods.items()),
            ),
            io.Combo.Input(
                "preset",
                options=presets,
                default="tuned" if "tuned" in presets else presets[0],
                tooltip="published: the authors' settings. tuned: those that did best on the embedded model.",
            ),
            io.Float.Input(
                "strength",
                default=1.0,
                min=0.05,
                max=MAX_STRENGTH,
                step=0.05,
                tooltip="Scales the edit: 1 is as the method works it out, less forgets less.",
            ),
            io.Int.Input(
                "seed",
                default=0,
                min=0,
                max=MAX_SEED,
                control_after_generate=False,
                tooltip="For methods that draw noise. The same inputs give the same patch; leave it fixed.",
            ),
            io.String.Input(
                "settings",
                optional=True,
                default="",
                dynamic_prompts=False,
                tooltip='Single settings of the method in place of the preset\'s, as JSON: {"rank": 8}. Mostly empty.',
            ),
        ]
        extra: dict[str, Any] = {}
        # 2026-01 and later; an older host would refuse the whole pack over an unknown field
        if "search_aliases" in {field.name for field in dataclasses.fields(io.Schema)}:
            extra["search_aliases"] = ["unlearn", "erase concept", "remove concept", "forget me not"]
        return io.Schema(
            node_id="ForgetConcept",
            display_name="Forget Concept",
            category="model_patches/unlearning",
            description="Makes the model forget an object, a style or a person, and keeps the rest. "
            "Gives the patched model, and the patch as a LoRA that every ComfyUI can load.",
            inputs=inputs,
            outputs=[
                io.Model.Output("MODEL", tooltip="The model with the patch on."),
                io.Custom("LORA_MODEL").Output(
                    "LORA_MODEL", tooltip="The patch itself: for Save LoRA Weights or Load LoRA Model."
                ),
                io.String.Output("REPORT", tooltip="What was done, in words."),
            ],
            hidden=[io.Hidden.unique_id],
            **extra,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        concept: str,
        kind: str,
        replacement: str,
        preserve: str,
        method: str,
        preset: str,
        strength: float,
        seed: int,
        settings: str = "",
    ) -> io.NodeOutput:
        request = request_from_words(concept, kind, replacement, preserve, method, preset, strength, seed, settings)
        start = time.monotonic()
        with host.borrowed(model, clip) as diffusion:
            patch = fit(diffusion, request, host.progress(cls.hidden.unique_id))
            lora = kohya.to_state(patch, diffusion.survey, dotted=True)
        patched = host.with_lora(model, lora)
        notes = []
        if count := host.patched_weights(model):
            notes.append(
                f"the MODEL that came in carries patches on {count} weights (LoRAs, an earlier Forget Concept). The "
                "edit was worked out on top of them: the LoRA belongs on top of the same ones."
            )
        words = report(request, patch, time.monotonic() - start, get(method).title, notes)
        host.show_text(cls.hidden.unique_id, words)
        return io.NodeOutput(patched, lora, words)
