"""What the rest of the package knows of a raw model: its layers by canonical names, and where a text enters it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from torch import nn

from ..errors import ModelError
from .text_entries import TextEntry

__all__ = [
    "PROJECTIONS",
    "TEXT_PROJECTIONS",
    "CrossAttentionSite",
    "Layer",
    "ModelSurvey",
    "attention_linear",
    "is_linear",
    "plain_linear",
]

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
# those that read the text
TEXT_PROJECTIONS = ("to_k", "to_v")


@dataclass(frozen=True)
class CrossAttentionSite:
    """One cross-attention module of a UNet.

    Attributes:
        name: Canonical (diffusers) name.
        ldm_name: The same site in LDM naming.
        path: The module's path in this UNet.
        module: The attention module.
        heads: Number of attention heads.
        context_dim: Width of the text states that K and V read.
    """

    name: str
    ldm_name: str
    path: str
    module: nn.Module = field(repr=False, compare=False)
    heads: int
    context_dim: int

    def projection(self, which: str) -> nn.Linear:
        """The ``nn.Linear`` of ``to_q``, ``to_k``, ``to_v`` or ``to_out`` (the linear part of the latter)."""
        if which not in PROJECTIONS:
            raise ModelError(f"There is no projection '{which}': choose from {', '.join(PROJECTIONS)}.")
        return attention_linear(self.module, which, self.path)

    def key(self, which: str) -> str:
        """The canonical key of a projection: ``<name>.<which>``."""
        return f"{self.name}.{which}"

    def weight_path(self, which: str) -> str:
        """The projection's module path in this UNet, e.g. ``….attn2.to_out.0``."""
        return f"{self.path}.{which}" + (".0" if which == "to_out" else "")


@dataclass(frozen=True)
class Layer:
    """One linear layer of a transformer block: self-attention, cross-attention or feed-forward.

    Attributes:
        key: Canonical key, such as ``….attn1.to_q``, ``….attn2.to_out`` or ``….ff.net.0.proj``.
        ldm_key: The same layer in LDM naming.
        path: The module's path in this UNet.
        module: The linear layer.
    """

    key: str
    ldm_key: str
    path: str
    module: nn.Linear = field(repr=False, compare=False)


@dataclass(frozen=True)
class ModelSurvey(ABC):
    """A raw model's layers and text entries; a family of models is a subclass.

    Attributes:
        unet: The raw model.
        sites: Its cross-attention modules in forward order; empty for a model without any.
        layout: The naming of this model's modules: ``ldm`` (or ``original``) or ``diffusers``.
        family: Id of the model's family.
        context_dim: Width of the token states that it reads.
    """

    unet: nn.Module = field(repr=False, compare=False)
    sites: tuple[CrossAttentionSite, ...]
    layout: str
    family: str
    context_dim: int

    def __iter__(self) -> Iterator[CrossAttentionSite]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @cached_property
    def _sites_by_name(self) -> Mapping[str, CrossAttentionSite]:
        return {site.name: site for site in self.sites}

    def by_name(self, name: str) -> CrossAttentionSite:
        """Return the site with this canonical name. Raises :class:`ModelError` if there is none."""
        try:
            return self._sites_by_name[name]
        except KeyError:
            raise ModelError(f"This model has no cross-attention site '{name}'.") from None

    def split(self, key: str) -> tuple[CrossAttentionSite, str] | None:
        """Return the site and projection of a canonical key, or ``None`` if this UNet lacks it."""
        name, _, which = key.rpartition(".")
        site = self._sites_by_name.get(name)
        return None if site is None or which not in PROJECTIONS else (site, which)

    @property
    @abstractmethod
    def layers(self) -> Mapping[str, Layer]:
        """Every linear layer that a method may train, by canonical key."""

    @property
    @abstractmethod
    def entries(self) -> tuple[TextEntry, ...]:
        """The layers that read text first."""

    def edited(self, stream: str, projections: Sequence[str] = TEXT_PROJECTIONS) -> list[TextEntry]:
        """The entries of a stream; of a UNet's cross-attention only the given projections."""
        left_out = tuple(f".{which}" for which in TEXT_PROJECTIONS if which not in projections)
        return [entry for entry in self.entries if entry.stream == stream and not entry.key.endswith(left_out)]

    def trained_keys(self, projections: Sequence[str]) -> list[str]:
        """Keys of the layers that trained methods change: these projections of the cross-attention, in order."""
        return [site.key(which) for site in self.sites for which in projections]

    @abstractmethod
    def find(self, key: str) -> Layer | None:
        """Return the layer with a canonical key, or ``None`` if this model lacks it."""

    @property
    def caution(self) -> str:
        """What the note of every patch for this model says; empty: nothing."""
        return ""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the architecture: names and shapes, not weights. Equal in every layout."""

    def width(self, stream: str) -> int | None:
        """Width of a stream of text states; ``None`` where this model does not read it."""
        return next((entry.width for entry in self.entries if entry.stream == stream), None)

    def layer(self, key: str) -> Layer:
        """Like :meth:`find`, but raises :class:`ModelError` if the layer is missing."""
        if (found := self.find(key)) is None:
            raise ModelError(f"This model has no projection '{key}'.")
        return found

    def linear(self, key: str) -> nn.Linear:
        """Return the ``nn.Linear`` with a canonical key. Raises :class:`ModelError` if it is missing."""
        return self.layer(key).module


def attention_linear(attention: nn.Module, which: str, path: str) -> nn.Linear:
    """A projection of an attention module, of whatever library, at ``path``."""
    module: Any = getattr(attention, which, None)
    if which == "to_out" and isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module):
        module = module[0]
    return plain_linear(module, f"{path}.{which}")


def plain_linear(module: Any, path: str) -> nn.Linear:
    """The module if it is a linear layer whose weight can be read. Raises :class:`ModelError` if it is not."""
    if not is_linear(module):
        raise ModelError(
            f"'{path}' is {'missing' if module is None else 'a ' + type(module).__name__} instead of a plain "
            "linear layer: unload adapters and quantisation from the model first."
        )
    return cast(nn.Linear, module)  # a host's own class has the same weight and call


def is_linear(module: Any) -> bool:
    """Whether this is a linear layer whose weight can be read, of torch or of a host."""
    return isinstance(module, nn.Linear) or _is_bare_linear(module)


def _is_bare_linear(module: Any) -> bool:
    """Whether this is a host's own linear class that does not derive from torch's.

    A weight that is no plain parameter, such as a quantised one, counts where the module itself says how it is read
    (``convert_weight``); whoever computes with it has to ask.
    """
    if not isinstance(module, nn.Module) or any(True for _ in module.children()):
        return False
    weight = module._parameters.get("weight")
    wanted = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if weight is None or not (type(weight) is nn.Parameter or callable(getattr(module, "convert_weight", None))):
        return False
    return tuple(weight.shape) == wanted and weight.is_floating_point()
