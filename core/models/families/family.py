"""What a family of diffusion transformers says about itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..text_states import TextStates

__all__ = ["BlockPath", "EntryPath", "Family", "submodules"]


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
class BlockPath:
    """Where a linear layer stands that every block has and a trained method may change.

    Only layers that are the same matrix in both namings are among them: queries, keys and values are one layer in the
    authors' code and three in diffusers.

    Attributes:
        original: Its path in the authors' naming, with ``{}`` for the number of the block.
        diffusers: Its path in diffusers.
    """

    original: str
    diffusers: str


def _renamed(name: str, pattern: str, target: str) -> str | None:
    """The name in the target pattern, if it fits the other one; in either, dots may be underscores."""
    match = re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)").replace(r"\.", r"[._]"), name)
    if match is None:
        return None
    return target.format(*match.groups())


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
        blocks: Layers of its blocks that trained methods change.
        caution: What the note of every patch for it says; empty: nothing.
        predict: Calls a model of diffusers with latents, their share of noise and text states, for the velocity.
    """

    id: str
    title: str
    original: frozenset[str]
    diffusers: frozenset[str]
    entries: tuple[EntryPath, ...]
    base_model: str = ""
    blocks: tuple[BlockPath, ...] = ()
    caution: str = ""
    predict: Callable[[Any, Tensor, Tensor, TextStates], Tensor] | None = None

    def layout_of(self, paths: frozenset[str]) -> str | None:
        """The naming of a model with these submodules, ``original`` or ``diffusers``; ``None`` for other families."""
        for layout, marks in (("original", self.original), ("diffusers", self.diffusers)):
            if marks and marks <= paths:
                return layout
        return None

    def original_name(self, name: str) -> str | None:
        """The canonical key of a name in the authors' naming, which may be flattened with underscores."""
        return self._translated(name, "original", "original")

    def key_of(self, path: str) -> str | None:
        """The canonical key of a path in diffusers; ``None`` if no layer that a patch may change is called that."""
        return self._translated(path, "diffusers", "original")

    def diffusers_path(self, key: str) -> str | None:
        """The path in diffusers of a canonical key; ``None`` if the family has no such layer."""
        return self._translated(key, "original", "diffusers")

    def _translated(self, name: str, given: str, wanted: str) -> str | None:
        for one in (*self.entries, *self.blocks):
            if (found := _renamed(name, getattr(one, given), getattr(one, wanted))) is not None:
                return found
        return None


def submodules(module: nn.Module) -> frozenset[str]:
    """The paths of a module's children and grandchildren."""
    children = dict(module.named_children())
    inner = {f"{name}.{below}" for name, child in children.items() for below, _ in child.named_children()}
    return frozenset(inner | set(children))
