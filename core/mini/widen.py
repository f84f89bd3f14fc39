"""The embedded autoencoder as hosts can read it: the same function with 32 groups in every norm.

Ours has 8 groups, four channels or more in each, because a group of one channel loses its mean and with it the
colour. The original layout fixes 32 groups. Four times the width with dead channels behind the live ones gives
exactly that: the first 8 groups are ours, the others hold zeros, which every layer keeps at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from . import config

HOST_GROUPS = 32
# Sides that face pictures or latents, not features: (name, dimension) keep their size.
_OUTSIDE = {("encoder.conv_in", 1), ("decoder.conv_out", 0), ("encoder.conv_out", 0), ("decoder.conv_in", 1)}


def widened_config(autoencoder: Mapping[str, Any] = config.AUTOENCODER) -> dict[str, Any]:
    """diffusers' configuration of the widened autoencoder."""
    factor = HOST_GROUPS // autoencoder["norm_num_groups"]
    widths = tuple(width * factor for width in autoencoder["block_out_channels"])
    return {**autoencoder, "block_out_channels": widths, "norm_num_groups": HOST_GROUPS}


def widen(state: Mapping[str, Tensor], autoencoder: Mapping[str, Any] = config.AUTOENCODER) -> dict[str, Tensor]:
    """A state dict of `widened_config` that computes what `state` computes (diffusers' names in and out)."""
    factor = HOST_GROUPS // autoencoder["norm_num_groups"]
    wide = {}
    for key, tensor in state.items():
        name, kind = key.rsplit(".", 1)
        if name in ("quant_conv", "post_quant_conv"):
            wide[key] = tensor
            continue
        if name.endswith(".to_q"):
            tensor = tensor * factor**0.5  # attention divides by the root of the width
        sides: list[int] = []
        for dimension in range(tensor.ndim - 1, -1, -1):
            grows = dimension < 2 and (name, dimension) not in _OUTSIDE
            if kind == "bias" and (name, 0) in _OUTSIDE:
                grows = False
            sides += [0, tensor.shape[dimension] * (factor - 1) if grows else 0]
        wide[key] = pad(tensor, sides)
    return wide
