"""Stable Diffusion 3 and 3.5: T5 states, and the pooled vectors of two CLIPs side by side.

Source: `SD3Transformer2DModel` in diffusers, `MMDiT` in ComfyUI.
"""

from __future__ import annotations

from ..text_entries import POOLED, TOKENS
from .family import EntryPath, Family

__all__ = ["SD3"]

SD3 = Family(
    id="sd3",
    title="Stable Diffusion 3",
    original=frozenset({"joint_blocks", "x_embedder"}),
    diffusers=frozenset({"transformer_blocks", "pos_embed", "context_embedder"}),
    entries=(
        EntryPath(TOKENS, "context_embedder", "context_embedder"),
        EntryPath(POOLED, "y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ),
)
