"""Chroma, made of Flux.1 schnell: T5 states and no pooled vector.

Source: `ChromaTransformer2DModel` in diffusers, `Chroma` in ComfyUI.
"""

from __future__ import annotations

from ..text_entries import TOKENS
from .family import EntryPath, Family
from .flux import BLOCKS

__all__ = ["CHROMA"]

CHROMA = Family(
    id="chroma",
    title="Chroma",
    original=frozenset({"double_blocks", "single_blocks", "distilled_guidance_layer"}),
    diffusers=frozenset({"transformer_blocks", "single_transformer_blocks", "distilled_guidance_layer"}),
    entries=(EntryPath(TOKENS, "txt_in", "context_embedder"),),
    blocks=BLOCKS,
)
