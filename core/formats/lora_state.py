"""A patch as a LoRA's state dict in memory, such as ComfyUI's LORA_MODEL, and back.

A plain state dict has no room for a patch's metadata. :class:`LoraState` is such a dict to every other program and
carries the metadata as an attribute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PatchError, listed
from ..models.model_survey import ModelSurvey
from ..patch.patch import Patch
from . import contents, kohya

__all__ = ["LoraState", "contents_of_lora", "patch_of", "state_of"]


class LoraState(dict[str, Tensor]):
    """A LoRA's state dict with the ``metadata`` of the patch it is."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata or {})


def state_of(patch: Patch, survey: ModelSurvey | None = None) -> LoraState:
    """A patch under the original (LDM) layer names; pass ``survey`` where there is a model (see :func:`to_state`)."""
    return LoraState(kohya.to_state(patch, survey, dotted=True), patch.metadata)


def patch_of(lora: Any, survey: ModelSurvey | None = None, source: str = "the LORA_MODEL that came in") -> Patch:
    """A LoRA's state dict as a patch, with its metadata where it has some.

    Raises :class:`PatchError` for what is not a LoRA, and for one that changes more than a patch can.
    """
    tensors = _tensors_of(lora, source)
    # clones made outside of inference mode are ordinary tensors, which gradients may flow past
    with torch.inference_mode(False), torch.no_grad():
        cloned = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return kohya.from_state(cloned, getattr(lora, "metadata", {}), survey, source)


def contents_of_lora(
    lora: Any, survey: ModelSurvey | None = None, source: str = "the LORA_MODEL that came in"
) -> contents.Contents:
    """What a LoRA's state dict holds, including adapters that a patch cannot express.

    Raises :class:`PatchError` for what is no adapter, and for a damaged one.
    """
    return contents.contents_of(_tensors_of(lora, source), getattr(lora, "metadata", {}), survey, source)


def _tensors_of(lora: Any, source: str) -> dict[str, Tensor]:
    if not isinstance(lora, Mapping) or not all(isinstance(name, str) for name in lora):
        raise PatchError(f"There is no LoRA in {source}: connect a LORA_MODEL output.")
    if odd := [name for name, tensor in lora.items() if not isinstance(tensor, Tensor)]:
        raise PatchError(f"{source} is no LoRA that can be read: {listed(odd, 2)} is not a tensor.")
    return dict(lora)
