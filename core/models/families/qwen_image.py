"""Qwen-Image: states of a language model, behind a norm.

Source: `QwenImageTransformer2DModel` in diffusers and in ComfyUI; the naming is the same.
"""

from __future__ import annotations

from ..text_entries import TOKENS
from .family import EntryPath, Family

__all__ = ["QWEN_IMAGE"]

QWEN_IMAGE = Family(
    id="qwen-image",
    title="Qwen-Image",
    original=frozenset({"transformer_blocks", "txt_norm", "img_in"}),
    diffusers=frozenset(),
    entries=(EntryPath(TOKENS, "txt_in", "txt_in", norm="txt_norm", norm_diffusers="txt_norm"),),
)
