"""A patch as ComfyUI's LORA_MODEL, and back: no host in it.

ComfyUI's own type is a plain state dict, which has no room for what a patch says of itself. :class:`LoraState` is such
a dict to everybody, with the metadata beside it for those who look.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import PatchError
from ..core.formats import kohya
from ..core.models.unet import UNetSurvey
from ..core.patch.patch import Patch

__all__ = ["LoraState", "patch_of", "state_of"]


class LoraState(dict[str, Tensor]):
    """A LoRA's state dict with the ``metadata`` of the patch it is."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata or {})


def state_of(patch: Patch, survey: UNetSurvey | None = None) -> LoraState:
    """A patch under ComfyUI's own layer names; ``survey`` where a model is at hand (see :func:`to_state`)."""
    return LoraState(kohya.to_state(patch, survey, dotted=True), patch.metadata)


def patch_of(lora: Any, survey: UNetSurvey | None = None, source: str = "the LORA_MODEL that came in") -> Patch:
    """What came in by a LORA_MODEL wire as a patch, with its metadata where it has some.

    Raises :class:`PatchError`, in words, for what is no LoRA, or one that changes more than a patch can.
    """
    if not isinstance(lora, Mapping) or not all(isinstance(name, str) for name in lora):
        raise PatchError(f"There is no LoRA in {source}: connect a LORA_MODEL output.")
    # clones made outside of inference mode are ordinary tensors, which gradients may flow past
    with torch.inference_mode(False), torch.no_grad():
        tensors = {name: tensor.detach().clone() for name, tensor in lora.items() if isinstance(tensor, Tensor)}
        return kohya.from_state(tensors, getattr(lora, "metadata", {}), survey, source)
