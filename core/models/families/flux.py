"""Flux.1 (dev, schnell, Krea, Kontext): T5 states, and a pooled vector of CLIP-L.

Source: `FluxTransformer2DModel` in diffusers, `Flux` in ComfyUI.
"""

from __future__ import annotations

from ..text_entries import POOLED, TOKENS
from .family import EntryPath, Family

__all__ = ["FLUX"]

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
)
