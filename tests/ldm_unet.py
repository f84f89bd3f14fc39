"""The original latent-diffusion UNet from PyPI's ``stable-diffusion-sdkit`` (``pip install --no-deps``), for tests."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

REASON = "no `ldm` package: `pip install --no-deps stable-diffusion-sdkit` brings the original UNetModel"


def ldm_unet_class() -> Any:
    """``UNetModel``; without the package, the test is skipped with a reason."""
    pytest.importorskip("ldm", reason=REASON)
    if "omegaconf" not in sys.modules:
        try:
            import omegaconf  # noqa: F401
        except ImportError:  # only one class of it is used, in an isinstance check
            config, listed = types.ModuleType("omegaconf"), types.ModuleType("omegaconf.listconfig")
            listed.ListConfig = type("ListConfig", (), {})  # type: ignore[attr-defined]
            config.listconfig = listed  # type: ignore[attr-defined]
            sys.modules |= {"omegaconf": config, "omegaconf.listconfig": listed}
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel


def ldm_unet(**changes: Any) -> Any:
    """A tiny LDM UNet of the same architecture as ``tiny.tiny_unet()``."""
    config = {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": 2,
        "attention_resolutions": [1, 2],
        "channel_mult": [1, 2],
        "num_heads": 4,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 32,
        "use_checkpoint": False,
        "legacy": False,
    }
    return ldm_unet_class()(**(config | changes)).eval()
