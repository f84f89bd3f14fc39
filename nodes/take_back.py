"""Node *Take Back*."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.errors import RequestError, listed
from ..core.formats.lora_state import patch_of, state_of
from ..core.methods.sequence import History
from ..core.patch.history import read_history, requests_to_restore
from ..core.service.summaries import history_summary, surviving_share_summary
from . import host
from .common import LORA, Node, patch_outputs, reported, schema
from .forget_in_sequence import check_base

__all__ = ["TakeBack"]


class TakeBack(Node):
    """Removes requests from a patch, by concept or by number.

    Closed forms are solved again for the remaining requests, which needs the base model; trained requests are dropped.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptTakeBack",
            display_name="Take Back (Forget Concept)",
            description="Removes requests from a patch that holds several: the model knows these concepts again, and "
            "the others stay forgotten.",
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint's own model, on which the patch was made."),
                io.Clip.Input("clip", tooltip="The model's text encoder, with the CLIP Set Last Layer used before."),
                LORA.Input("lora", tooltip="A patch with a record, from Forget in Sequence or Load Forget Patch."),
                io.String.Input(
                    "which",
                    default="",
                    dynamic_prompts=False,
                    tooltip="What to take back: concepts, or numbers of requests as Inspect Forget Patch shows them (2 "
                    "or #2), separated by commas.",
                ),
            ],
            outputs=patch_outputs("The patch of the remaining requests"),
            hidden=[io.Hidden.unique_id],
            search_aliases=["restore concept", "remember"],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, lora: Any, which: str) -> io.NodeOutput:
        record = read_history(getattr(lora, "metadata", {}))
        wanted = requests_to_restore(which, record.records)
        with host.latent_diffusion(model, clip) as diffusion:
            history = History.from_patch(patch_of(lora, diffusion.survey))
            check_base(history, diffusion, model)
            before, trained_on_top = history.concepts, set()
            progress = host.progress(cls.hidden.unique_id)
            for one in wanted:
                trained_on_top |= {later.number for later in history.trained_on(one)}
                history = history.without(one, diffusion, progress)
            if not history.parts:
                raise RequestError(
                    "The patch would be empty without these requests: use the model without the patch instead."
                )
            patch = history.patch
            remaining = state_of(patch, diffusion.survey)
        taken_back = [concept.name for concept in before if concept not in history.concepts]
        lines = [f"taken back: {listed(taken_back, 12)}", *surviving_share_summary(host.surviving_share(model, patch))]
        later = [one.names for one in history.records if one.number in trained_on_top]
        if later:
            lines.append(f"note: {listed(later)} were trained on top of it, and stay as they were trained")
        lines += ["still forgotten:", *history_summary(read_history(patch.metadata))]
        words = "\n".join(lines)
        return reported(cls.hidden.unique_id, words, host.with_lora(model, remaining), remaining, words)
