"""Node *Forget Concept*."""

from __future__ import annotations

import time
from typing import Any

from comfy_api.latest import io

from ..core.formats.lora_state import state_of
from ..core.methods.fit import fit
from ..core.service.summaries import fit_summary, surviving_share_summary
from . import host
from .common import (
    Node,
    RequestInputs,
    adjust_inputs,
    fit_context,
    optional_request_inputs,
    patch_outputs,
    reported,
    required_request_inputs,
    schema,
    theme_input,
)

__all__ = ["ForgetConcept", "run_request"]


class ForgetConcept(Node):
    """Fits a patch on the host's loaded model, and returns the patched MODEL, the patch as LORA_MODEL and a report.

    The patch is fitted on top of the patches that the MODEL already carries (LoRAs, an earlier Forget Concept), so
    that the edit applies to exactly this MODEL; without any, the patch belongs to the plain checkpoint. The incoming
    MODEL stays bit-identical on success, error and cancellation.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConcept",
            display_name="Forget Concept",
            description="Makes the model forget an object, a style or a person, and retains the rest. "
            "Returns the patched model, and the patch as a LoRA that any ComfyUI can load.",
            inputs=[*required_request_inputs(), *optional_request_inputs(), theme_input(), *adjust_inputs()],
            outputs=patch_outputs(),
            hidden=[io.Hidden.unique_id],
            search_aliases=["unlearn", "erase concept", "remove concept", "forget me not"],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, **given: Any) -> io.NodeOutput:
        return run_request(cls.hidden.unique_id, model, clip, RequestInputs.read(**given))


def run_request(node: str | None, model: Any, clip: Any, request_inputs: RequestInputs) -> io.NodeOutput:
    """Fit a request; returns the node's output: the patched MODEL, the patch and a report.

    Raises:
        ForgetConceptError: If an input does not fit the model, or the fit fails.
    """
    start = time.monotonic()
    with fit_context(node, model, clip, request_inputs) as (diffusion, progress, inputs):
        patch = fit(diffusion, request_inputs.plan, progress, inputs)
        lora = state_of(patch, diffusion.survey)
    patched = host.with_lora(model, lora)
    notes = [*request_inputs.notes, *surviving_share_summary(host.surviving_share(model, patch))]
    if count := host.patched_weights(model):
        notes.append(
            f"the MODEL already carries patches on {count} weights (LoRAs, an earlier Forget Concept). The edit was "
            "fitted on top of them: apply the LoRA on top of the same patches."
        )
    words = fit_summary(
        request_inputs.request, patch, time.monotonic() - start, request_inputs.plan.method.title, notes
    )
    return reported(node, words, patched, lora, words)
