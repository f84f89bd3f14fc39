"""Patches as one LoRA file in diffusers' own names, for models that diffusers cannot read a kohya file of.

Its converters of kohya files know no name for the layer that reads SDXL's pooled vector, and none for those of most
diffusion transformers. Written: ``unet.<path>.lora_A.weight`` and ``.lora_B.weight`` (``transformer.…``), which
diffusers, ComfyUI and Forge load, and AUTOMATIC1111 does not. There are no alphas: every layer is padded with zeros to
one rank, because diffusers would scale other ranks. Read: as every other LoRA file, by :mod:`.kohya`.
"""

from __future__ import annotations

import os

import torch
from torch.nn import functional

from ..errors import PatchError
from ..files.safetensors_io import write_safetensors
from ..models.model_survey import ModelSurvey
from ..patch.outlets import saves_as
from ..patch.patch import Patch
from . import naming

__all__ = ["save", "to_state"]


def to_state(patch: Patch, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The patch as a state dict.

    Raises:
        PatchError: A value overflows ``dtype``.
    """
    state: dict[str, torch.Tensor] = {}
    for key, factor in patch.factors.items():
        padding = patch.rank - factor.rank
        up = functional.pad(factor.up.detach().cpu().to(dtype), (0, padding))
        down = functional.pad(factor.down.detach().cpu().to(dtype), (0, 0, 0, padding))
        if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise PatchError(
                f"The patch overflows {str(dtype).removeprefix('torch.')} at {key}: save it in a wider dtype."
            )
        if (path := naming.diffusers_path(key, patch.about.family)) is not None:
            layer = f"transformer.{path}"
        else:
            layer = f"unet.{key}.0" if key.endswith(".to_out") else f"unet.{key}"
        state[f"{layer}.lora_A.weight"] = down.contiguous()
        state[f"{layer}.lora_B.weight"] = up.contiguous()
    return state


@saves_as("diffusers")
def save(
    patch: Patch,
    path: str | os.PathLike[str],
    survey: ModelSurvey | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a patch atomically as one file in diffusers' names.

    Args:
        patch: The patch.
        path: The ``.safetensors`` file.
        survey: Not needed; layers are written under their diffusers paths.
        dtype: Dtype of the factors.

    Raises:
        PatchError: A factor is not finite or overflows ``dtype``, or the file cannot be written.
    """
    patch.check_finite()
    write_safetensors(to_state(patch, dtype), path, {**patch.metadata, "format": "pt"})
