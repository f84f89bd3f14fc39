"""Names for architectures that are recognised and not supported, so that a refusal can name the model's family."""

from __future__ import annotations

from torch import nn

from .families.family import submodules
from .families.registry import family_of

__all__ = ["architecture_of"]

# by the names of submodules, first match
_MARKS: tuple[tuple[str, frozenset[str]], ...] = (
    ("AuraFlow", frozenset({"double_layers", "single_layers"})),
    ("PixArt", frozenset({"t_block", "x_embedder", "y_embedder", "blocks"})),
    ("LTX-Video", frozenset({"transformer_blocks", "adaln_single", "patchify_proj"})),
)


def architecture_of(module: nn.Module) -> str | None:
    """The family of a diffusion transformer by its submodules, in the naming of its authors or of diffusers.

    Returns:
        Its name for a sentence; ``None`` for UNets and for anything unknown.
    """
    if (found := family_of(module)) is not None:
        return found[0].title
    paths = submodules(module)
    return next((name for name, marks in _MARKS if marks <= paths), None)
