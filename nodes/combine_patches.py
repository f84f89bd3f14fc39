"""Node *Combine Forget Patches*."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.errors import PatchError
from ..core.formats.lora_state import patch_of, state_of
from ..core.patch.patch import Patch
from ..core.request.request import strength_warning
from ..core.service.summaries import patch_summary
from .common import LORA, Node, reported, schema

__all__ = ["CombineForgetPatches"]

_SLOTS = "abcd"


class CombineForgetPatches(Node):
    """Sums up to four patches at their strengths into one; exact unless the rank is bounded. Chain nodes for more."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs: list[Any] = []
        for i, slot in enumerate(_SLOTS):
            inputs.append(
                LORA.Input(f"lora_{slot}", optional=i > 0, tooltip="A patch; unconnected inputs are ignored.")
            )
        for slot in _SLOTS:
            inputs.append(
                io.Float.Input(
                    f"strength_{slot}",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip=f"Multiplier of lora_{slot} in the sum. 1: as it was made. 0: left out.",
                )
            )
        inputs.append(
            io.Int.Input(
                "max_rank",
                default=0,
                min=0,
                max=4096,
                tooltip="Upper bound of the combined rank, for a smaller file. 0: no bound, the sum is exact.",
            )
        )
        return schema(
            node_id="ForgetConceptCombinePatches",
            display_name="Combine Forget Patches",
            description="Combines several patches, each at its strength, into a single patch.",
            inputs=inputs,
            outputs=[
                LORA.Output("LORA_MODEL", tooltip="The combined patch."),
                io.String.Output("REPORT", tooltip="What the patch contains, and how much a bounded rank preserves."),
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
            raise PatchError("The sum of these patches is zero: raise one of the strengths.")
        lines = []
        if max_rank and whole.rank > max_rank:
            truncated = whole.truncated(max_rank)
            lines.append(
                f"truncated from rank {whole.rank} to {truncated.rank}: "
                f"{100 * _preserved_share(whole, truncated):.1f} % of the edit is preserved"
            )
            whole = truncated
        lines += [f"warning: {warning}" for _, s in patches if (warning := strength_warning(s)) is not None]
        words = "\n".join([patch_summary(whole), *lines])
        return reported(cls.hidden.unique_id, words, state_of(whole), words)


def _preserved_share(whole: Patch, truncated: Patch) -> float:
    """The share of ``‖Δ‖²`` in the truncated patch, which is an orthogonal projection of the whole."""
    squares = [sum(float(f.delta().square().sum()) for f in patch.factors.values()) for patch in (truncated, whole)]
    return squares[0] / squares[1]
