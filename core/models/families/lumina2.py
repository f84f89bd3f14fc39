"""Lumina 2, and Z-Image in the authors' naming: states of a language model, behind a norm.

Source: `Lumina2Transformer2DModel` in diffusers, `NextDiT` in ComfyUI.
"""

from __future__ import annotations

from ..text_entries import TOKENS
from .family import EntryPath, Family

__all__ = ["LUMINA2"]

LUMINA2 = Family(
    id="lumina2",
    title="Lumina 2 or Z-Image",
    original=frozenset({"noise_refiner", "context_refiner", "cap_embedder"}),
    diffusers=frozenset({"noise_refiner", "context_refiner", "time_caption_embed.caption_embedder"}),
    entries=(
        EntryPath(
            TOKENS,
            "cap_embedder.1",
            "time_caption_embed.caption_embedder.1",
            norm="cap_embedder.0",
            norm_diffusers="time_caption_embed.caption_embedder.0",
        ),
    ),
)
