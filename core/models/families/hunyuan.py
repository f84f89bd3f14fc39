"""HunyuanImage and HunyuanVideo: states of a language model, their mean, and HunyuanVideo's pooled vector of CLIP-L.

What HunyuanImage also reads of glyphs (byT5) is the text to be written, and stays as it is.

Source: `HunyuanImageTransformer2DModel` and `HunyuanVideoTransformer3DModel` in diffusers, `HunyuanVideo` in ComfyUI.
"""

from __future__ import annotations

from ..text_entries import MEAN, POOLED, TOKENS
from .family import EntryPath, Family

__all__ = ["HUNYUAN"]

HUNYUAN = Family(
    id="hunyuan",
    title="Hunyuan",
    original=frozenset({"double_blocks", "single_blocks", "img_in.proj", "txt_in.input_embedder"}),
    diffusers=frozenset({"transformer_blocks", "single_transformer_blocks", "context_embedder.token_refiner"}),
    entries=(
        EntryPath(TOKENS, "txt_in.input_embedder", "context_embedder.proj_in"),
        EntryPath(MEAN, "txt_in.c_embedder.in_layer", "context_embedder.time_text_embed.text_embedder.linear_1"),
        EntryPath(POOLED, "vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ),
)
