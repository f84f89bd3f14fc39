"""What other programs' loaders make of a LoRA file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_unet


def diffusers_changes(path: Path, unet: Any = None) -> dict[str, torch.Tensor]:
    """The change of each layer of a UNet (default: a tiny one) that a diffusers pipeline makes of a LoRA file."""
    pytest.importorskip("peft", reason="diffusers reads LoRA files through peft")
    pytest.importorskip("diffusers", "0.35", reason="an older diffusers reads LoRA files in other ways")
    from diffusers import StableDiffusionPipeline

    unet = unet or tiny_unet()
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        str(path), unet_config=unet.config, return_lora_metadata=True
    )
    unet.load_lora_adapter(state, network_alphas=alphas, metadata=metadata, prefix="unet")
    return {
        name.removesuffix(".0") if name.endswith("to_out.0") else name: module.get_delta_weight("default_0").detach()
        for name, module in unet.named_modules()
        if hasattr(module, "get_delta_weight")
    }
