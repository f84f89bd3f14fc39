"""What a family of diffusion transformers says about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..text_states import TextStates

__all__ = ["EntryPath", "Family"]


@dataclass(frozen=True)
class EntryPath:
    """Where one linear layer that reads text first stands.

    Attributes:
        stream: The stream of text states that it reads.
        original: Its path in the authors' naming, which ComfyUI and checkpoints use. It is the canonical key.
        diffusers: Its path in diffusers.
        norm: Path of a norm between the text states and the layer, in the authors' naming; empty: none.
        norm_diffusers: The same in diffusers.
    """

    stream: str
    original: str
    diffusers: str
    norm: str = ""
    norm_diffusers: str = ""


@dataclass(frozen=True)
class Family:
    """A family of diffusion transformers, recognised by its submodules.

    Attributes:
        id: In metadata of a patch.
        title: In sentences.
        original: Submodules that the authors' naming has, and no other family's.
        diffusers: Submodules that diffusers' naming has.
        entries: Its text entries, the tokens' first. One whose layer a model of the family lacks is left out.
        base_model: What kohya's trainer calls the base model in a file, if it trains this family.
        predict: Calls a model of diffusers with latents, their share of noise and text states, for the velocity.
    """

    id: str
    title: str
    original: frozenset[str]
    diffusers: frozenset[str]
    entries: tuple[EntryPath, ...]
    base_model: str = ""
    predict: Callable[[Any, Tensor, Tensor, TextStates], Tensor] | None = None

    def layout_of(self, paths: frozenset[str]) -> str | None:
        """The naming of a model with these submodules, ``original`` or ``diffusers``; ``None`` for other families."""
        for layout, marks in (("original", self.original), ("diffusers", self.diffusers)):
            if marks and marks <= paths:
                return layout
        return None


def submodules(module: nn.Module) -> frozenset[str]:
    """The paths of a module's children and grandchildren."""
    children = dict(module.named_children())
    inner = {f"{name}.{below}" for name, child in children.items() for below, _ in child.named_children()}
    return frozenset(inner | set(children))
