"""Attention mass of chosen tokens, without materializing attention maps.

``A = softmax(Q Kᵀ / √d_head)`` over all tokens; the *mass* of a token is its column of ``A``. With one indicator column
per token in place of V, scaled-dot-product attention returns exactly these columns, through whichever fused kernel
torch picks. The fused kernels need Q, K and V of one width, so all three are zero-padded and the scale is passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from ..errors import ForgetConceptError, TokenError
from ..models.model_survey import CrossAttentionSite, ModelSurvey
from .activations import ActivationCapture, CapturedProjection, split_heads

__all__ = ["AttentionCapture", "attention_mass", "attention_mass_reference", "split_heads", "token_mask"]


def token_mask(positions: Sequence[Sequence[int]], tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """Indicator columns of token positions.

    Args:
        positions: For each prompt its token positions. A prompt with fewer positions than another gets zero columns.
        tokens: Tokens per prompt.
        device: Device of the result.

    Returns:
        ``(batch, tokens, n)``, fp32: column ``i`` of row ``b`` is 1 at its ``i``-th position and 0 elsewhere.

    Raises:
        TokenError: A prompt has no position (its loss would be zero and look like success), or one is out of range.
    """
    if not positions or not all(positions):
        raise TokenError("There is a prompt in which no token of the concept was found: give prompts that contain it.")
    if any(not 0 <= p < tokens for row in positions for p in row):
        raise TokenError(f"A token position lies outside the prompt's {tokens} tokens: shorten the prompt.")
    mask = torch.zeros(len(positions), tokens, max(len(row) for row in positions))
    for b, row in enumerate(positions):
        mask[b, list(row), list(range(len(row)))] = 1
    return mask.to(device)


def _check_shapes(q: Tensor, k: Tensor, mask: Tensor, heads: int) -> None:
    fits = q.ndim == k.ndim == mask.ndim == 3 and q.shape[0] == k.shape[0] == mask.shape[0]
    if not fits or q.shape[2] != k.shape[2] or k.shape[1] != mask.shape[1] or q.shape[2] % heads:
        raise ForgetConceptError(
            f"Attention of queries {tuple(q.shape)}, keys {tuple(k.shape)}, mask {tuple(mask.shape)} and {heads} heads "
            "does not fit together: expected (batch, pixels, width), (batch, tokens, width), (batch, tokens, columns)."
        )


def attention_mass_reference(q: Tensor, k: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Reference for :func:`attention_mass`: materializes the whole map."""
    _check_shapes(q, k, mask, heads)
    q, k = split_heads(q, heads), split_heads(k, heads)
    attention = torch.softmax((q @ rearrange(k, "b h t d -> b h d t")) * q.shape[-1] ** -0.5, dim=-1)
    return attention @ rearrange(mask.to(attention.dtype), "b t n -> b 1 t n")


def attention_mass(
    q: Tensor,
    k: Tensor,
    mask: Tensor,
    heads: int,
    implementation: Literal["sdpa", "reference"] = "sdpa",
) -> Tensor:
    """Each pixel's attention mass on the tokens of a mask; differentiable in ``q`` and ``k``.

    Args:
        q: Queries, ``(batch, pixels, heads · d)``.
        k: Keys, ``(batch, tokens, heads · d)``.
        mask: Indicator columns, ``(batch, tokens, n)``; a column with several ones gives the sum of their masses.
        heads: Number of heads.
        implementation: ``"sdpa"``, or ``"reference"``, which materializes the map.

    Returns:
        ``(batch, heads, pixels, n)``, in the dtype of ``q``.

    Raises:
        ForgetConceptError: The shapes do not fit together.
    """
    if implementation == "reference":
        return attention_mass_reference(q, k, mask, heads)
    _check_shapes(q, k, mask, heads)
    columns = mask.shape[2]
    q, k = split_heads(q, heads), split_heads(k, heads)
    scale = q.shape[-1] ** -0.5
    # a multiple of 8, because the fused kernels need aligned rows
    width = -(-max(q.shape[-1], columns) // 8) * 8
    q, k = F.pad(q, (0, width - q.shape[-1])), F.pad(k, (0, width - k.shape[-1]))
    v = repeat(F.pad(mask.to(q.dtype), (0, width - columns)), "b t n -> b h t n", h=heads)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :columns]


class AttentionCapture(ActivationCapture):
    """Captures every site's queries and keys in the latest forward pass.

    ``q[name]`` is ``(batch, pixels, heads · d)`` and ``k[name]`` ``(batch, tokens, heads · d)``.
    """

    def __init__(self, survey: ModelSurvey, sites: Sequence[CrossAttentionSite] | None = None) -> None:
        queries, keys = CapturedProjection("to_q"), CapturedProjection("to_k")
        super().__init__(survey.sites if sites is None else sites, (queries, keys))
        self.q, self.k = queries.by_site, keys.by_site

    def masses(self, mask: Tensor, implementation: Literal["sdpa", "reference"] = "sdpa") -> list[Tensor]:
        """Every site's mass on the mask's columns, fp32, in the survey's order; see :func:`attention_mass`.

        Raises:
            ForgetConceptError: No forward pass has reached one of the sites.
        """
        self.check_captured()
        return [
            attention_mass(
                self.q[site.name], self.k[site.name], mask.to(self.k[site.name].device), site.heads, implementation
            ).float()
            for site in self.sites
        ]
