"""Flux.2 (dev, Klein): states of several layers of a language model side by side, and no pooled vector.

Source: `Flux2Transformer2DModel` in diffusers, `Flux` in ComfyUI.
"""

from __future__ import annotations

from ..text_entries import TOKENS
from .family import EntryPath, Family

__all__ = ["FLUX2"]

FLUX2 = Family(
    id="flux2",
    title="Flux.2",
    original=frozenset({"double_blocks", "single_blocks", "double_stream_modulation_img"}),
    diffusers=frozenset({"transformer_blocks", "single_transformer_blocks", "double_stream_modulation_img"}),
    entries=(EntryPath(TOKENS, "txt_in", "context_embedder"),),
)
