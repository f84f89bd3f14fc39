"""Node *Apply Forget Patch*."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.formats.lora_state import patch_of, state_of
from ..core.request.request import check_patch_strength, strength_warning
from ..core.service.summaries import base_model_summary, surviving_share_summary
from . import host
from .common import LORA, Node, reported, schema

__all__ = ["ApplyForgetPatch"]


class ApplyForgetPatch(Node):
    """Applies a patch to a MODEL at a strength, if it fits, and reports how much of it the weights' dtype preserves."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptApplyPatch",
            display_name="Apply Forget Patch",
            description="Applies a patch to a model at a strength. Refuses a patch for another architecture, and "
            "reports how much of the edit survives rounding to the model's dtype.",
            inputs=[
                io.Model.Input("model", tooltip="The model to apply the patch to, with or without LoRAs."),
                LORA.Input(
                    "lora", tooltip="The patch, from Load Forget Patch, Forget Concept or Combine Forget Patches."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Multiplier of the patch. 1: as it was made. 0: off. Negative: the opposite edit.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The patched model."),
                io.String.Output(
                    "REPORT", tooltip="Whether the patch was made on this model, and how much of the edit survives."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            search_aliases=["apply lora", "use patch"],
        )

    @classmethod
    def execute(cls, model: Any, lora: Any, strength: float) -> io.NodeOutput:
        survey = host.surveyed(model, lora)
        patch = patch_of(lora, survey)
        patch.check_fits(survey)
        check_patch_strength(strength)
        lines = [f"{len(patch)} weights at strength {strength:g}"]
        if strength == 0:
            patched = model
            lines.append("strength 0 leaves the model unchanged")
        else:
            patched = host.with_lora(model, state_of(patch, survey), strength)
            lines += surviving_share_summary(host.surviving_share(model, patch, strength))
        if (warning := strength_warning(strength)) is not None:
            lines.append(f"warning: {warning}")
        lines.append(base_model_summary(patch.metadata, host.weights_hash(model)))
        words = "\n".join(lines)
        return reported(cls.hidden.unique_id, words, patched, words)
