"""Flux.1 (dev, schnell, Krea, Kontext): T5 states, and a pooled vector of CLIP-L.

Source: `FluxTransformer2DModel` in diffusers, `Flux` in ComfyUI.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..text_entries import POOLED, TOKENS
from ..text_states import TextStates
from .family import BlockPath, EntryPath, Family

__all__ = ["BLOCKS", "FLUX"]

# of a model that takes the guidance as an input (dev); it was distilled from one with classifier-free guidance
GUIDANCE = 3.5


def predict(model: Any, x: Tensor, sigma: Tensor, states: TextStates) -> Tensor:
    """Call diffusers' transformer with latents ``(n, c, h, w)``, in patches of 2×2 latent pixels as tokens."""
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(x)
    guidance = x.new_full((len(x),), GUIDANCE) if model.config.guidance_embeds else None
    out: Tensor = model(
        hidden_states=rearrange(x, "n c (h p) (w q) -> n (h w) (c p q)", p=2, q=2),
        encoder_hidden_states=states.hidden,
        pooled_projections=states.pooled,
        timestep=sigma,
        img_ids=places,
        txt_ids=places.new_zeros(states.hidden.shape[1], 3),
        guidance=guidance,
        return_dict=False,
    )[0]
    return rearrange(out, "n (h w) (c p q) -> n c (h p) (w q)", h=height, w=width, p=2, q=2)


# what a block writes: the outputs of its attention and of its feed-forward layers, for the picture and for the text
BLOCKS = (
    BlockPath("double_blocks.{}.img_attn.proj", "transformer_blocks.{}.attn.to_out.0"),
    BlockPath("double_blocks.{}.txt_attn.proj", "transformer_blocks.{}.attn.to_add_out"),
    BlockPath("double_blocks.{}.img_mlp.0", "transformer_blocks.{}.ff.net.0.proj"),
    BlockPath("double_blocks.{}.img_mlp.2", "transformer_blocks.{}.ff.net.2"),
    BlockPath("double_blocks.{}.txt_mlp.0", "transformer_blocks.{}.ff_context.net.0.proj"),
    BlockPath("double_blocks.{}.txt_mlp.2", "transformer_blocks.{}.ff_context.net.2"),
    BlockPath("single_blocks.{}.linear2", "single_transformer_blocks.{}.proj_out"),
)
FLUX = Family(
    id="flux",
    title="Flux",
    original=frozenset({"double_blocks", "single_blocks", "img_in", "txt_in"}),
    diffusers=frozenset({"transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder"}),
    entries=(
        EntryPath(TOKENS, "txt_in", "context_embedder"),
        EntryPath(POOLED, "vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ),
    base_model="flux1",
    blocks=BLOCKS,
    predict=predict,
)
