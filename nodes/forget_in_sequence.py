"""Node *Forget in Sequence*."""

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
from .common import (
    LORA,
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

__all__ = ["ForgetInSequence", "check_base"]


def check_base(history: History, diffusion: LatentDiffusion, model: Any) -> None:
    """As :meth:`History.check_base`, with a remedy if the reason is that the MODEL carries patches.

    Raises:
        PatchError: If the earlier requests were made on another base model.
    """
    try:
        history.check_base(diffusion)
    except PatchError as error:
        if count := host.patched_weights(model):
            raise PatchError(
                f"The MODEL carries patches on {count} weights, so it is not the base model of the earlier requests: "
                "connect the checkpoint's own MODEL, and pass the earlier patch only as LORA_MODEL."
            ) from error
        raise


class ForgetInSequence(Node):
    """Adds a request to those of an earlier patch; the resulting patch contains all of them.

    Each request is fitted against the *base* model, so that drift does not accumulate. The record of requests is part
    of the patch: files, the next of these nodes and Take Back read it.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptInSequence",
            display_name="Forget in Sequence",
            description="Forgets further concepts in addition to those of an earlier patch. The patch records its "
            "requests, so that any of them can be taken back.",
            inputs=[
                *required_request_inputs(),
                LORA.Input(
                    "earlier",
                    optional=True,
                    tooltip="The patch to extend, from Forget in Sequence, Forget Concept or Load Forget Patch. "
                    "Unconnected: this is the first request.",
                ),
                *optional_request_inputs(),
                io.Int.Input(
                    "max_rank",
                    optional=True,
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Upper bound of the patch's rank. 0: no bound. A truncated request cannot be taken back.",
                ),
                theme_input(),
                *adjust_inputs(),
            ],
            outputs=patch_outputs("The patch of all requests, with their record"),
            hidden=[io.Hidden.unique_id],
            search_aliases=["continual unlearning", "unlearn more"],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, earlier: Any = None, max_rank: int = 0, **given: Any) -> io.NodeOutput:
        request_inputs = RequestInputs.read(**given)
        if earlier is not None:
            # reject invalid input before a model is loaded
            next_record(read_history(getattr(earlier, "metadata", {})).parts, request_inputs.plan)
        start = time.monotonic()
        with fit_context(cls.hidden.unique_id, model, clip, request_inputs) as (diffusion, progress, inputs):
            history = History()
            if earlier is not None:
                history = History.from_patch(patch_of(earlier, diffusion.survey))
                check_base(history, diffusion, model)
            history = history.bounded(max_rank or history.max_rank)
            history = history.forget(diffusion, request_inputs.plan, progress, inputs)
            patch = history.patch
            lora = state_of(patch, diffusion.survey)
        patched = host.with_lora(model, lora)
        notes = [*request_inputs.notes, *surviving_share_summary(host.surviving_share(model, patch))]
        words = fit_summary(
            request_inputs.request, patch, time.monotonic() - start, request_inputs.plan.method.title, notes
        )
        words += "\nall requests:\n" + "\n".join(history_summary(read_history(patch.metadata)))
        return reported(cls.hidden.unique_id, words, patched, lora, words)
