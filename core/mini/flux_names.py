"""Weights of `mini-flow`'s transformer under the authors' names, which hosts have; needs only safetensors.

Source: `Flux` of the authors' repository, and `FluxTransformer2DModel` in diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["transformer_to_original"]

_ONCE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
# several layers of diffusers are one, one below the other
_DOUBLE = {
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
_SINGLE = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}


def transformer_to_original(state: Mapping[str, Tensor], transformer: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename and join a diffusers state dict.

    Args:
        state: State dict of a ``FluxTransformer2DModel``.
        transformer: Its configuration.
    """
    found = {}
    for what in ("weight", "bias"):
        for name, stored in _ONCE.items():
            found[f"{name}.{what}"] = state[f"{stored}.{what}"]
        # diffusers has the scale before the shift
        scale, shift = state[f"norm_out.linear.{what}"].chunk(2)
        found[f"final_layer.adaLN_modulation.1.{what}"] = torch.cat([shift, scale])
    kinds = (
        ("double_blocks", "transformer_blocks", transformer["num_layers"], _DOUBLE, _DOUBLE_NORMS),
        ("single_blocks", "single_transformer_blocks", transformer["num_single_layers"], _SINGLE, _SINGLE_NORMS),
    )
    blocks = [(f"{a}.{i}.", f"{b}.{i}.", layers, norms) for a, b, count, layers, norms in kinds for i in range(count)]
    for own, stored, layers, norms in blocks:
        for name, parts in layers.items():
            for what in ("weight", "bias"):
                found[f"{own}{name}.{what}"] = torch.cat([state[f"{stored}{part}.{what}"] for part in parts])
        for name, norm in norms.items():
            found[f"{own}{name}.scale"] = state[f"{stored}{norm}.weight"]
    return found
