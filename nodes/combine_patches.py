"""The node that makes one patch of several."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.errors import PatchError
from ..core.formats.lora_state import patch_of, state_of
from ..core.patch.patch import Patch
from ..core.service.summaries import patch_summary
from . import host
from .common import LORA, schema

__all__ = ["CombineForgetPatches"]

_SLOTS = "abcd"


class CombineForgetPatches(io.ComfyNode):
    """Up to four patches at their strengths as one, exactly, unless its rank is bounded; for more, combine again."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs: list[Any] = []
        for i, slot in enumerate(_SLOTS):
            inputs.append(
                LORA.Input(
                    f"lora_{slot}", optional=i > 0, tooltip="A patch; those that are not connected are left out."
                )
            )
        for slot in _SLOTS:
            inputs.append(
                io.Float.Input(
                    f"strength_{slot}",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip=f"How strong lora_{slot} is in the whole.",
                )
            )
        inputs.append(
            io.Int.Input(
                "max_rank",
                default=0,
                min=0,
                max=4096,
                tooltip="Bound of the whole patch's rank, for a smaller file; 0: none, and the sum is exact.",
            )
        )
        return schema(
            node_id="ForgetConceptCombinePatches",
            display_name="Combine Forget Patches",
            description="Several patches at their strengths as one patch: one file, one node, one load.",
            inputs=inputs,
            outputs=[
                LORA.Output("LORA_MODEL", tooltip="The one patch."),
                io.String.Output("REPORT", tooltip="What is in it, and how much of the sum a bounded rank holds."),
            ],
            hidden=[io.Hidden.unique_id],
            search_aliases=["merge lora", "merge patches"],
        )

    @classmethod
    def execute(cls, max_rank: int, **given: Any) -> io.NodeOutput:
        patches = [
            (patch_of(lora, source=f"lora_{slot}"), float(given[f"strength_{slot}"]))
            for slot in _SLOTS
            if (lora := given.get(f"lora_{slot}")) is not None
        ]
        whole = Patch.combined([(patch, strength) for patch, strength in patches if strength != 0] or patches[:1])
        if whole.max_abs() == 0:
            raise PatchError("The sum of these patches changes nothing: raise a strength.")
        lines = []
        if max_rank and whole.rank > max_rank:
            cut = whole.truncated(max_rank)
            lines.append(
                f"cut from rank {whole.rank} to {cut.rank}: {100 * _held(whole, cut):.1f} % of the edit is held"
            )
            whole = cut
        words = "\n".join([patch_summary(whole), *lines])
        host.show_text(cls.hidden.unique_id, words)
        return io.NodeOutput(state_of(whole), words)


def _held(whole: Patch, cut: Patch) -> float:
    """The share of ``‖Δ‖²`` that is in the cut one, which is its projection."""
    squares = [sum(float(f.delta().square().sum()) for f in patch.factors.values()) for patch in (cut, whole)]
    return squares[0] / squares[1]
