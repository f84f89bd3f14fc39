"""The values of a MODEL's weights, whatever the host stores them as, and where it keeps them."""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.model_management as management
import comfy.model_patcher
import torch
from torch import Tensor, nn

__all__ = ["ORDINARY", "UNET", "dequantised", "effective_weight", "stored_weight"]

# every other type of tensor is quantised, or has its values elsewhere
ORDINARY = (Tensor, nn.Parameter)
UNET = "diffusion_model."


def stored_weight(patcher: Any, key: str) -> tuple[Tensor, Any, list[Any]]:
    """A weight as the host keeps it, without patches; the function that reads it, or ``None``; and its patches.

    The host's own ``get_key_patches`` fails where a layer is quantised: its scales are in the state dict alone.
    """
    weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    if (original := patcher.backup.get(key)) is not None:
        weight = original.weight
    if (original := patcher.hook_backup.get(key)) is not None:
        weight = original[0]
    return weight, convert, list(patcher.patches.get(key, ()))


def effective_weight(patcher: Any, key: str) -> Tensor:
    """A weight with its patches in float32, in memory of its own."""
    weight, convert, patches = stored_weight(patcher, key)
    if type(weight) in ORDINARY:
        value = management.cast_to_device(weight, patcher.load_device, torch.float32, copy=True)
        value = value if convert is None else convert(value, inplace=True)
    else:
        value = management.cast_to_device(dequantised(weight, convert), patcher.load_device, torch.float32, copy=True)
    found: Tensor = comfy.lora.calculate_weight(patches, value, key)
    return found


def dequantised(weight: Tensor, convert: Any) -> Tensor:
    """The values of a weight that is no plain tensor, or of a plain one as it is."""
    return weight if convert is None or type(weight) in ORDINARY else convert(weight)
