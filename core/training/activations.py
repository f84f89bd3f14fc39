"""What goes into the projections of the cross-attention sites and what comes out of them, kept from a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..errors import ForgetConceptError
from ..models.unet import CrossAttentionSite, UNetSurvey

__all__ = [
    "ActivationCapture",
    "CapturedProjection",
    "SiteCapture",
    "attention_map",
    "cross_attention_map",
    "cross_attention_output",
    "merge_heads",
    "sampled",
    "split_heads",
]

R = TypeVar("R", bound="ActivationCapture")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``(batch, n, heads · d)`` → ``(batch, heads, n, d)``; the batch stays in front, so a row's mask stays its own."""
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def merge_heads(x: Tensor) -> Tensor:
    """``(batch, heads, n, d)`` → ``(batch, n, heads · d)``, the inverse of :func:`split_heads`."""
    return rearrange(x, "b h n d -> b n (h d)")


@dataclass(frozen=True)
class CapturedProjection:
    """One side of one projection: its output, or with ``given`` its input; ``by_site`` holds the latest of each."""

    projection: str
    given: bool = False
    by_site: dict[str, Tensor] = field(default_factory=dict)

    def hook(self, site: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.by_site[site] = args[0] if self.given else output

        return keep


class ActivationCapture:
    """A context manager that listens to projections of some sites, differentiable and host-agnostic.

    It works with every attention backend, and sees what adapters add if those were attached before.
    """

    def __init__(self, sites: Iterable[CrossAttentionSite], kept: Sequence[CapturedProjection]) -> None:
        self.sites, self.kept = tuple(sites), tuple(kept)
        self._hooks: list[RemovableHandle] = []

    def __enter__(self: R) -> R:
        try:
            for site in self.sites:
                for kept in self.kept:
                    hook = kept.hook(site.name)
                    self._hooks.append(site.projection(kept.projection).register_forward_hook(hook))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self.clear()

    def clear(self) -> None:
        """Let go of what was kept (and of the graph behind it)."""
        for kept in self.kept:
            kept.by_site.clear()

    def check_seen(self) -> None:
        """Raises :class:`ForgetConceptError` where no forward pass has been seen."""
        for site in self.sites:
            if any(site.name not in kept.by_site for kept in self.kept):
                raise ForgetConceptError(f"No forward pass has reached {site.name}: there is nothing of it to look at.")


class SiteCapture(ActivationCapture):
    """Keeps every site's input and output of the latest forward pass.

    ``x[name]`` is what ``to_q`` is given and ``out[name]`` what ``to_out`` returns, both ``(batch, pixels, width)``.
    """

    def __init__(self, survey: UNetSurvey) -> None:
        given, returned = CapturedProjection("to_q", given=True), CapturedProjection("to_out")
        super().__init__(survey.sites, (given, returned))
        self.x, self.out = given.by_site, returned.by_site

    def inputs(self) -> list[Tensor]:
        """Every site's input in the survey's order.

        Raises :class:`ForgetConceptError` where no forward pass has been seen.
        """
        self.check_seen()
        return [self.x[site.name] for site in self.sites]

    def outputs(self) -> list[Tensor]:
        """Every site's output in the survey's order; raises as :meth:`inputs`."""
        self.check_seen()
        return [self.out[site.name] for site in self.sites]


def cross_attention_output(site: CrossAttentionSite, x: Tensor, context: Tensor) -> Tensor:
    """A site's output ``(batch, pixels, width)`` for inputs ``x`` ``(batch, pixels, width)`` under ``context``.

    ``context`` is ``(batch, tokens, d)``. The projections are called as the UNet calls them, with whatever is attached.
    """
    q, k, v = (
        split_heads(part, site.heads)
        for part in (site.projection("to_q")(x), site.projection("to_k")(context), site.projection("to_v")(context))
    )
    mixed = F.scaled_dot_product_attention(q, k, v)
    output: Tensor = site.projection("to_out")(merge_heads(mixed))
    return output


def cross_attention_map(site: CrossAttentionSite, x: Tensor, context: Tensor) -> Tensor:
    """The site's attention map ``softmax(Q Kᵀ / √d_head)``, fp32, ``(batch, heads, pixels, tokens)``; see above."""
    return attention_map(site.projection("to_q")(x), site.projection("to_k")(context), site.heads)


def attention_map(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """``softmax(Q Kᵀ / √d_head)``, fp32, ``(batch, heads, pixels, tokens)``, of recorded queries and keys."""
    q, k = split_heads(q, heads), split_heads(k, heads)
    scores = (q @ rearrange(k, "b h t d -> b h d t")).float()
    return torch.softmax(scores * q.shape[-1] ** -0.5, dim=-1)


def sampled(x: Tensor, positions: Tensor) -> Tensor:
    """The given pixels of each row: ``x`` ``(batch, pixels, width)`` and ``positions`` ``(batch, n)`` to ``(batch, n,
    width)``."""
    return torch.gather(x, 1, repeat(positions.to(x.device), "b n -> b n d", d=x.shape[-1]))
