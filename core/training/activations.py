"""Inputs and outputs of the cross-attention projections, captured during a forward pass."""

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
from ..models.model_survey import CrossAttentionSite, ModelSurvey

__all__ = [
    "ActivationCapture",
    "CapturedProjection",
    "SiteCapture",
    "attention_map",
    "cross_attention_map",
    "cross_attention_output",
    "gather_pixels",
    "merge_heads",
    "split_heads",
]

R = TypeVar("R", bound="ActivationCapture")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``(batch, n, heads · d)`` → ``(batch, heads, n, d)``."""
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def merge_heads(x: Tensor) -> Tensor:
    """``(batch, heads, n, d)`` → ``(batch, n, heads · d)``, the inverse of :func:`split_heads`."""
    return rearrange(x, "b h n d -> b n (h d)")


@dataclass(frozen=True)
class CapturedProjection:
    """The captured outputs of one projection, or with ``of_input`` its inputs; ``by_site`` holds each site's latest."""

    projection: str
    of_input: bool = False
    by_site: dict[str, Tensor] = field(default_factory=dict)

    def hook(self, site: str) -> Any:
        def capture(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.by_site[site] = args[0] if self.of_input else output

        return capture


class ActivationCapture:
    """A context manager that captures projections of some sites, with their autograd graph.

    It works with every attention backend. The captured tensors include what adapters add, if those were attached first.
    """

    def __init__(self, sites: Iterable[CrossAttentionSite], captures: Sequence[CapturedProjection]) -> None:
        self.sites, self.captures = tuple(sites), tuple(captures)
        self._hooks: list[RemovableHandle] = []

    def __enter__(self: R) -> R:
        try:
            for site in self.sites:
                for captured in self.captures:
                    hook = captured.hook(site.name)
                    self._hooks.append(site.projection(captured.projection).register_forward_hook(hook))
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
        """Release the captured tensors and the graph behind them."""
        for captured in self.captures:
            captured.by_site.clear()

    def check_captured(self) -> None:
        """Check that every site has been captured.

        Raises:
            ForgetConceptError: No forward pass has reached one of the sites.
        """
        for site in self.sites:
            if any(site.name not in captured.by_site for captured in self.captures):
                raise ForgetConceptError(
                    f"No forward pass has reached {site.name}, so nothing was captured: run the UNet inside the block."
                )


class SiteCapture(ActivationCapture):
    """Captures every site's input and output in the latest forward pass.

    ``x[name]`` is the input of ``to_q`` and ``out[name]`` the output of ``to_out``, both ``(batch, pixels, width)``.
    """

    def __init__(self, survey: ModelSurvey) -> None:
        inputs, outputs = CapturedProjection("to_q", of_input=True), CapturedProjection("to_out")
        super().__init__(survey.sites, (inputs, outputs))
        self.x, self.out = inputs.by_site, outputs.by_site

    def inputs(self) -> list[Tensor]:
        """Every site's input, in the survey's order.

        Raises:
            ForgetConceptError: No forward pass has reached one of the sites.
        """
        self.check_captured()
        return [self.x[site.name] for site in self.sites]

    def outputs(self) -> list[Tensor]:
        """Every site's output, in the survey's order; raises as :meth:`inputs`."""
        self.check_captured()
        return [self.out[site.name] for site in self.sites]


def cross_attention_output(site: CrossAttentionSite, x: Tensor, context: Tensor) -> Tensor:
    """A site's output, computed from its input alone; hooks on the projections apply.

    Args:
        site: The cross-attention site.
        x: Its input, ``(batch, pixels, width)``.
        context: Text states, ``(batch, tokens, d)``.

    Returns:
        ``(batch, pixels, width)``.
    """
    q, k, v = (
        split_heads(part, site.heads)
        for part in (site.projection("to_q")(x), site.projection("to_k")(context), site.projection("to_v")(context))
    )
    mixed = F.scaled_dot_product_attention(q, k, v)
    output: Tensor = site.projection("to_out")(merge_heads(mixed))
    return output


def cross_attention_map(site: CrossAttentionSite, x: Tensor, context: Tensor) -> Tensor:
    """A site's attention map, fp32, ``(batch, heads, pixels, tokens)``; arguments as :func:`cross_attention_output`."""
    return attention_map(site.projection("to_q")(x), site.projection("to_k")(context), site.heads)


def attention_map(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """The attention map ``softmax(Q Kᵀ / √d_head)`` of captured queries and keys.

    Args:
        q: ``(batch, pixels, heads · d_head)``.
        k: ``(batch, tokens, heads · d_head)``.
        heads: Number of heads.

    Returns:
        ``(batch, heads, pixels, tokens)``, fp32.
    """
    q, k = split_heads(q, heads), split_heads(k, heads)
    scores = (q @ rearrange(k, "b h t d -> b h d t")).float()
    return torch.softmax(scores * q.shape[-1] ** -0.5, dim=-1)


def gather_pixels(x: Tensor, positions: Tensor) -> Tensor:
    """Some pixels of each row.

    Args:
        x: ``(batch, pixels, width)``.
        positions: Indices of the pixels, ``(batch, n)``.

    Returns:
        ``(batch, n, width)``.
    """
    return torch.gather(x, 1, repeat(positions.to(x.device), "b n -> b n d", d=x.shape[-1]))
