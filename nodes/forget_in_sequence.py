"""The node that forgets one thing more, after what an earlier patch forgot."""

from __future__ import annotations

import time
from typing import Any

from comfy_api.latest import io

from ..core.errors import PatchError
from ..core.formats.lora_state import patch_of, state_of
from ..core.methods.sequence import History
from ..core.methods.sequence_rules import next_record
from ..core.models.latent_diffusion import LatentDiffusion
from ..core.patch.history import read_history
from ..core.service.summaries import fit_summary, history_summary, surviving_share_summary
from . import host
from .common import LORA, RequestInputs, asked_inputs, at_work, more_inputs, patch_outputs, schema

__all__ = ["ForgetInSequence", "check_base"]


def check_base(history: History, diffusion: LatentDiffusion, model: Any) -> None:
    """As :meth:`History.check_base`, with a hint where the MODEL's own patches make it another one."""
    try:
        history.check_base(diffusion)
    except PatchError as error:
        if count := host.patched_weights(model):
            raise PatchError(
                f"The MODEL that came in carries patches on {count} weights, so it is not the one that the earlier "
                "requests were made on: connect the checkpoint's own MODEL (the earlier patch comes in by its "
                "LORA_MODEL alone)."
            ) from error
        raise


class ForgetInSequence(io.ComfyNode):
    """One more request on the base model, with what earlier ones forgot; the patch that goes out holds all of them.

    Each request is worked out against the *base* model, so that drift does not add up, and the record of requests
    travels with the patch: into a file, into the next of these nodes, and to Take Back.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptInSequence",
            display_name="Forget in Sequence",
            description="Forgets one thing more, and keeps forgotten what an earlier patch forgot. The patch keeps a "
            "record of its requests, so that any of them can be taken back.",
            inputs=[
                *asked_inputs(),
                LORA.Input(
                    "earlier",
                    optional=True,
                    tooltip="The patch so far: from another Forget in Sequence, Forget Concept or Load Forget Patch. "
                    "Nothing: this is the first request.",
                ),
                *more_inputs(),
                io.Int.Input(
                    "max_rank",
                    optional=True,
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Bound of the whole patch's rank; 0: none. Where it cuts, nothing can be taken back.",
                ),
            ],
            outputs=patch_outputs("The patch of all requests, with their record"),
            hidden=[io.Hidden.unique_id],
            search_aliases=["continual unlearning", "unlearn more"],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, earlier: Any = None, max_rank: int = 0, **given: Any) -> io.NodeOutput:
        asked = RequestInputs.read(**given)
        if earlier is not None:
            # what can be refused without a model
            next_record(read_history(getattr(earlier, "metadata", {})).parts, asked.plan)
        start = time.monotonic()
        with at_work(cls.hidden.unique_id, model, clip, asked) as (diffusion, progress, inputs):
            history = History()
            if earlier is not None:
                history = History.from_patch(patch_of(earlier, diffusion.survey))
                check_base(history, diffusion, model)
            history = history.bounded(max_rank or history.max_rank)
            history = history.forget(diffusion, asked.plan, progress, inputs)
            patch = history.patch
            lora = state_of(patch, diffusion.survey)
        patched = host.with_lora(model, lora)
        notes = [*asked.notes, *surviving_share_summary(host.surviving_share(model, patch))]
        words = fit_summary(asked.request, patch, time.monotonic() - start, asked.plan.method.title, notes)
        words += "\nall requests:\n" + "\n".join(history_summary(read_history(patch.metadata)))
        host.show_text(cls.hidden.unique_id, words)
        return io.NodeOutput(patched, lora, words)
