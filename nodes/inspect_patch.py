"""Node *Inspect Forget Patch*."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.errors import PatchError, UnsupportedAdapterError
from ..core.formats.lora_state import contents_of_lora, patch_of
from ..core.service.summaries import (
    base_model_summary,
    contents_summary,
    last_request,
    patch_summary,
    surviving_share_summary,
)
from . import host
from .common import LORA, Node, reported, schema

__all__ = ["InspectForgetPatch"]


class InspectForgetPatch(Node):
    """Describes a patch: what it forgets, how it was made, its size, and whether it fits a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptInspectPatch",
            display_name="Inspect Forget Patch",
            description="Shows what a patch forgets, its method, settings, seed and base model, its size, and whether "
            "it fits a model.",
            inputs=[
                LORA.Input("lora", tooltip="The patch to inspect."),
                io.Model.Input("model", optional=True, tooltip="A model to check the patch against."),
            ],
            outputs=[
                io.String.Output("REPORT", tooltip="The description of the patch."),
                io.String.Output(
                    "REQUEST",
                    tooltip="The request that made the patch (the last of several) as JSON, for Forget by Request, the "
                    "webui or the command line. Empty if the patch has no record.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            search_aliases=["lora info", "patch info"],
        )

    @classmethod
    def execute(cls, lora: Any, model: Any = None) -> io.NodeOutput:
        survey = None if model is None else host.surveyed(model, lora)
        try:
            patch = patch_of(lora, survey)
        except UnsupportedAdapterError:
            words = "\n".join(contents_summary(contents_of_lora(lora, survey)))
            return reported(cls.hidden.unique_id, words, words, "", ui={"text": (words,)})
        lines = [patch_summary(patch)]
        if survey is not None:
            try:
                patch.check_fits(survey)
            except PatchError as error:
                lines.append(f"does not fit this MODEL: {error}")
            else:
                lines.append("fits this MODEL: it has every layer of the patch")
                lines += surviving_share_summary(host.surviving_share(model, patch))
                lines.append(base_model_summary(patch.metadata, host.weights_hash(model)))
        words = "\n".join(lines)
        return reported(cls.hidden.unique_id, words, words, last_request(patch), ui={"text": (words,)})
