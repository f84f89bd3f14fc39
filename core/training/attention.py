"""How much attention the pixels pay to chosen words, without attention maps being kept.

``A = softmax(Q Kᵀ / √d_head)`` over all tokens; the *mass* of a token is its column of ``A``. With one indicator column
a token in place of V, ordinary scaled-dot-product attention returns exactly these columns, by whichever fast kernel
torch has (those refuse a V wider than Q and K, so both sides are padded with zeros to one width and the scale is
given).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from ..errors import ForgetConceptError, TokenError
from ..models.unet import CrossAttentionSite, UNetSurvey
from .activations import ActivationCapture, CapturedProjection, split_heads

__all__ = ["AttentionCapture", "attention_mass", "attention_mass_reference", "split_heads", "token_mask"]


def token_mask(positions: Sequence[Sequence[int]], tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """Indicator columns ``(batch, tokens, n)``, fp32: row ``b``'s column ``i`` is 1 at its ``i``-th position, else 0.

    Each prompt has its own positions; where one has fewer than another, its last columns are zero and have no mass.
    Raises :class:`TokenError` for a prompt without positions (its loss would be zero and "succeed") or one outside.
    """
    if not positions or not all(positions):
        raise TokenError("There is a prompt in which no token of the concept was found.")
    if any(not 0 <= p < tokens for row in positions for p in row):
        raise TokenError(f"A token position lies outside the prompt's {tokens} tokens.")
    mask = torch.zeros(len(positions), tokens, max(len(row) for row in positions))
    for b, row in enumerate(positions):
        mask[b, list(row), list(range(len(row)))] = 1
    return mask.to(device)


def _checked(q: Tensor, k: Tensor, mask: Tensor, heads: int) -> None:
    fits = q.ndim == k.ndim == mask.ndim == 3 and q.shape[0] == k.shape[0] == mask.shape[0]
    if not fits or q.shape[2] != k.shape[2] or k.shape[1] != mask.shape[1] or q.shape[2] % heads:
        raise ForgetConceptError(
            f"Attention of queries {tuple(q.shape)}, keys {tuple(k.shape)}, mask {tuple(mask.shape)} and {heads} heads "
            "does not fit together: expected (batch, pixels, width), (batch, tokens, width), (batch, tokens, columns)."
        )


def attention_mass_reference(q: Tensor, k: Tensor, mask: Tensor, heads: int) -> Tensor:
    """The mass as its definition says it, with the whole map in memory; see :func:`attention_mass`."""
    _checked(q, k, mask, heads)
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
    """Each pixel's attention mass on each of a mask's columns: ``(batch, heads, pixels, n)``, in ``q``'s dtype.

    ``q`` is ``(batch, pixels, heads · d)``, ``k`` ``(batch, tokens, heads · d)``, ``mask`` ``(batch, tokens, n)`` with
    one column a token (a column with several ones gives their sum). Differentiable in ``q`` and ``k``. Raises
    :class:`ForgetConceptError` where the shapes do not fit together.
    """
    if implementation == "reference":
        return attention_mass_reference(q, k, mask, heads)
    _checked(q, k, mask, heads)
    columns = mask.shape[2]
    q, k = split_heads(q, heads), split_heads(k, heads)
    scale = q.shape[-1] ** -0.5
    # a multiple of 8: the fast kernels want aligned rows
    width = -(-max(q.shape[-1], columns) // 8) * 8
    q, k = F.pad(q, (0, width - q.shape[-1])), F.pad(k, (0, width - k.shape[-1]))
    v = repeat(F.pad(mask.to(q.dtype), (0, width - columns)), "b t n -> b h t n", h=heads)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :columns]


class AttentionCapture(ActivationCapture):
    """Keeps every site's queries and keys of the latest forward pass.

    ``q[name]`` is ``(batch, pixels, heads · d)``, ``k[name]`` likewise with tokens.
    """

    def __init__(self, survey: UNetSurvey, sites: Sequence[CrossAttentionSite] | None = None) -> None:
        queries, keys = CapturedProjection("to_q"), CapturedProjection("to_k")
        super().__init__(survey.sites if sites is None else sites, (queries, keys))
        self.q, self.k = queries.by_site, keys.by_site

    def masses(self, mask: Tensor, implementation: Literal["sdpa", "reference"] = "sdpa") -> list[Tensor]:
        """Every site's mass on the mask's columns, fp32, in the survey's order; see :func:`attention_mass`.

        Raises :class:`ForgetConceptError` where no forward pass has been seen.
        """
        self.check_seen()
        return [
            attention_mass(
                self.q[site.name], self.k[site.name], mask.to(self.k[site.name].device), site.heads, implementation
            ).float()
            for site in self.sites
        ]
