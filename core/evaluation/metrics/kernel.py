"""Kernel distance of two sets of features: KID, unbiased, with its standard error.

Bińkowski et al. (arXiv 1801.01401), equation 4: the squared maximum mean discrepancy under
``k(x, y) = (xᵀy / d + 1)³``, by the U-statistic, which is unbiased at every number of pictures and may be below 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import RequestError
from .frechet import check_features

__all__ = ["KID", "kid"]


@dataclass(frozen=True)
class KID:
    """The distance ``value`` of ``n`` pictures from ``n_reference`` others, and its standard ``error``.

    The error comes from ``subsets`` disjoint parts; ``None`` where there are too few pictures for two.
    """

    value: float
    error: float | None
    n: int
    n_reference: int
    width: int
    subsets: int

    def as_dict(self) -> dict[str, float | int | None]:
        return {
            "value": self.value,
            "error": self.error,
            "n": self.n,
            "n_reference": self.n_reference,
            "width": self.width,
            "subsets": self.subsets,
        }


def kid(features: Tensor, reference: Tensor, subsets: int = 10, seed: int = 0, *, paired: bool = False) -> KID:
    """KID of ``features`` ``(n, d)`` from ``reference`` ``(m, d)``, in fp64, over all pairs.

    For the error both are dealt at random (by ``seed``) to ``subsets`` disjoint parts: it is the standard error of the
    mean of the parts' own estimates, slightly more than that of the value. (Subsets that overlap, as often reported,
    say less than the truth.) ``paired``: row for row the same prompt and seed, so the two are no independent draws; a
    row is then not compared with its own partner, or the value would lie far below 0. Raises :class:`RequestError` for
    fewer than two rows, other widths, values that are not finite, fewer than two ``subsets``, and pairs that are none.
    """
    check_features(features, reference, 2)
    if paired and len(features) != len(reference):
        raise RequestError(f"Pairs were to be compared, and there are {len(features)} pictures and {len(reference)}.")
    if subsets < 2:
        raise RequestError(f"The error of a KID needs at least two subsets, not {subsets}.")
    first, second = (one.detach().double().cpu() for one in (features, reference))
    within, within_reference, across = _kernel(first, first), _kernel(second, second), _kernel(first, second)
    value = _unbiased(within, within_reference, across, paired)
    parts = min(subsets, len(first) // 2, len(second) // 2)
    error = None
    if parts > 1:
        draws = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(first), generator=draws).tensor_split(parts)
        columns = rows if paired else torch.randperm(len(second), generator=draws).tensor_split(parts)
        each = torch.tensor(
            [
                _unbiased(within[r][:, r], within_reference[c][:, c], across[r][:, c], paired)
                for r, c in zip(rows, columns, strict=True)
            ],
            dtype=torch.float64,
        )
        error = float(each.std()) / parts**0.5
    return KID(value, error, len(first), len(second), features.shape[1], parts if parts > 1 else 0)


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _unbiased(within: Tensor, within_reference: Tensor, across: Tensor, paired: bool) -> float:
    n, m = across.shape
    both = (across.sum() - across.trace()) / (n * (n - 1)) if paired else across.mean()
    own = (within.sum() - within.trace()) / (n * (n - 1))
    other = (within_reference.sum() - within_reference.trace()) / (m * (m - 1))
    return float(own + other - 2 * both)
