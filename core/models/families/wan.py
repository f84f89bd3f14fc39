"""Wan 2.1 and 2.2: states of UMT5.

Source: `WanTransformer3DModel` in diffusers, `WanModel` in ComfyUI.
"""

from __future__ import annotations

from ..text_entries import TOKENS
from .family import EntryPath, Family

__all__ = ["WAN"]

WAN = Family(
    id="wan",
    title="Wan",
    original=frozenset({"patch_embedding", "text_embedding", "time_projection", "blocks"}),
    diffusers=frozenset({"patch_embedding", "condition_embedder.text_embedder", "blocks"}),
    entries=(EntryPath(TOKENS, "text_embedding.0", "condition_embedder.text_embedder.linear_1"),),
)
