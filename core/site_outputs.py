"""What goes into every cross-attention site and what comes out of it, recorded on the way or worked out on its own.

A site's output at a pixel depends on that pixel's input and on the text alone, so that once inputs are recorded, sites
can be trained each on its own (:func:`site_output`), without a pass through the UNet.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import split_heads
from .recording import Kept, Recorder
from .unet import CrossAttentionSite, UNetSurvey

__all__ = ["SiteRecorder", "attention_map", "sampled", "site_map", "site_output"]


class SiteRecorder(Recorder):
    """Keeps every site's input and output of the latest forward pass.

    ``x[name]`` is what ``to_q`` is given and ``out[name]`` what ``to_out`` returns, both ``(batch, pixels, width)``.
    """

    def __init__(self, survey: UNetSurvey) -> None:
        given, returned = Kept("to_q", given=True), Kept("to_out")
        super().__init__(survey.sites, (given, returned))
        self.x, self.out = given.by_site, returned.by_site

    def inputs(self) -> list[Tensor]:
        """Every site's input in the survey's order.

        Raises :class:`~.errors.ForgetConceptError` where no forward pass has been seen.
        """
        self.check_seen()
        return [self.x[site.name] for site in self.sites]

    def outputs(self) -> list[Tensor]:
        """Every site's output in the survey's order; raises as :meth:`inputs`."""
        self.check_seen()
        return [self.out[site.name] for site in self.sites]


def site_output(site: CrossAttentionSite, x: Tensor, context: Tensor) -> Tensor:
    """A site's output ``(batch, pixels, width)`` for inputs ``x`` ``(batch, pixels, width)`` under ``context``.

    ``context`` is ``(batch, tokens, d)``. The projections are called as the UNet calls them, with whatever is attached.
    """
    q, k, v = (
        split_heads(part, site.heads)
        for part in (site.projection("to_q")(x), site.projection("to_k")(context), site.projection("to_v")(context))
    )
    mixed = F.scaled_dot_product_attention(q, k, v)
    return site.projection("to_out")(mixed.transpose(1, 2).flatten(2))


def site_map(site: CrossAttentionSite, x: Tensor, context: Tensor) -> Tensor:
    """The site's attention map ``softmax(Q Kᵀ / √d_head)``, fp32, ``(batch, heads, pixels, tokens)``; see above."""
    return attention_map(site.projection("to_q")(x), site.projection("to_k")(context), site.heads)


def attention_map(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """``softmax(Q Kᵀ / √d_head)``, fp32, ``(batch, heads, pixels, tokens)``, of recorded queries and keys."""
    q, k = split_heads(q, heads), split_heads(k, heads)
    return torch.softmax((q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5, dim=-1)


def sampled(x: Tensor, positions: Tensor) -> Tensor:
    """The given pixels of each row: ``x`` ``(batch, pixels, width)`` and ``positions`` ``(batch, n)`` to ``(batch, n,
    width)``."""
    rows = positions.to(x.device)[..., None].expand(-1, -1, x.shape[-1])
    return torch.gather(x, 1, rows)
