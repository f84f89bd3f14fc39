"""The node that makes a model forget."""

from __future__ import annotations

import time
from typing import Any

from comfy_api.latest import io

from ..core.formats.lora_state import state_of
from ..core.methods.fit import fit
from ..core.service.summaries import fit_summary, surviving_share_summary
from . import host
from .common import RequestInputs, asked_inputs, at_work, more_inputs, patch_outputs, schema

__all__ = ["ForgetConcept", "forgotten"]


class ForgetConcept(io.ComfyNode):
    """Works out a patch on the host's loaded model and gives it as a patched MODEL, as a LORA_MODEL and in words.

    The incoming MODEL is worked on *with* the patches it carries (LoRAs, an earlier Forget Concept): what is forgotten
    is what that very MODEL knows. Without any, the patch belongs to the plain checkpoint. The MODEL that came in stays
    bit-identical, whether the node ends well, with an error or by Cancel.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConcept",
            display_name="Forget Concept",
            description="Makes the model forget an object, a style or a person, and keeps the rest. "
            "Gives the patched model, and the patch as a LoRA that every ComfyUI can load.",
            inputs=[*asked_inputs(), *more_inputs()],
            outputs=patch_outputs(),
            hidden=[io.Hidden.unique_id],
            search_aliases=["unlearn", "erase concept", "remove concept", "forget me not"],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, **given: Any) -> io.NodeOutput:
        return forgotten(cls.hidden.unique_id, model, clip, RequestInputs.read(**given))


def forgotten(node: str | None, model: Any, clip: Any, asked: RequestInputs) -> io.NodeOutput:
    """What the node gives: the patched MODEL, the patch, and words."""
    start = time.monotonic()
    with at_work(node, model, clip, asked) as (diffusion, progress, inputs):
        patch = fit(diffusion, asked.plan, progress, inputs)
        lora = state_of(patch, diffusion.survey)
    patched = host.with_lora(model, lora)
    notes = [*asked.notes, *surviving_share_summary(host.surviving_share(model, patch))]
    if count := host.patched_weights(model):
        notes.append(
            f"the MODEL that came in carries patches on {count} weights (LoRAs, an earlier Forget Concept). The "
            "edit was worked out on top of them: the LoRA belongs on top of the same ones."
        )
    words = fit_summary(asked.request, patch, time.monotonic() - start, asked.plan.method.title, notes)
    host.show_text(node, words)
    return io.NodeOutput(patched, lora, words)
