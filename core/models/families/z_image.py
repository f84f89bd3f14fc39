"""Z-Image in diffusers: states of a language model, behind a norm.

Source: `ZImageTransformer2DModel` in diffusers. In the authors' naming it has the structure of :mod:`.lumina2`.
"""

from __future__ import annotations

from ..text_entries import TOKENS
from .family import EntryPath, Family

__all__ = ["Z_IMAGE"]

Z_IMAGE = Family(
    id="z-image",
    title="Z-Image",
    original=frozenset({"all_x_embedder", "noise_refiner", "context_refiner", "cap_embedder"}),
    diffusers=frozenset(),
    entries=(
        EntryPath(TOKENS, "cap_embedder.1", "cap_embedder.1", norm="cap_embedder.0", norm_diffusers="cap_embedder.0"),
    ),
)
