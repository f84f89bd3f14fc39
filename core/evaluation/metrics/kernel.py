"""Unbiased kernel distance (KID), with its standard error, of two sets of features of the same prompts and seeds.

The squared maximum mean discrepancy under ``k(x, y) = (xᵀy / d + 1)³``, estimated by the U-statistic, which is unbiased
for any number of images and may be negative.

torchmetrics' ``KernelInceptionDistance`` assumes independent sets. An edit is measured on pairs with the same prompt
and seed, which are not independent, so a row must not be compared with its own partner. torchmetrics cannot exclude
these pairs, and its estimate would be far below 0.

Reference: Bińkowski et al., arXiv 1801.01401, equation 4.
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
    """The distance ``value`` of ``n`` images from their ``n_reference`` partners, and its standard ``error``.

    The error is estimated from ``subsets`` disjoint subsets; it is ``None`` if there are too few images for two.
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


def kid(features: Tensor, reference: Tensor, subsets: int = 10, seed: int = 0) -> KID:
    """Compute the KID of ``features`` and ``reference``, over all pairs of rows except partners.

    Args:
        features: ``(n, d)``, computed in fp64.
        reference: ``(n, d)``; row by row the same prompt and seed as ``features``.
        subsets: Number of disjoint random parts for the error, which is the standard error of the mean of the parts'
            own estimates and slightly more than that of the value. Overlapping subsets, as often reported, understate
            it.
        seed: Seed of the random parts.

    Raises:
        RequestError: For fewer than two rows, unequal shapes, values that are not finite, or fewer than two subsets.
    """
    check_features(features, reference, 2)
    if len(features) != len(reference):
        raise RequestError(
            f"KID compares image pairs: give the same number of each, not {len(features)} and {len(reference)}."
        )
    if subsets < 2:
        raise RequestError(f"The error of a KID needs at least two subsets, not {subsets}.")
    first, second = (one.detach().double().cpu() for one in (features, reference))
    within, within_reference, across = _kernel(first, first), _kernel(second, second), _kernel(first, second)
    value = _unbiased(within, within_reference, across)
    parts = min(subsets, len(first) // 2)
    error = None
    if parts > 1:
        rows = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed)).tensor_split(parts)
        each = torch.tensor(
            [_unbiased(within[r][:, r], within_reference[r][:, r], across[r][:, r]) for r in rows], dtype=torch.float64
        )
        error = float(each.std()) / parts**0.5
    return KID(value, error, len(first), len(second), features.shape[1], parts if parts > 1 else 0)


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _unbiased(within: Tensor, within_reference: Tensor, across: Tensor) -> float:
    own, other, both = ((kernel.sum() - kernel.trace()) for kernel in (within, within_reference, across))
    n = len(across)
    return float(own + other - 2 * both) / (n * (n - 1))
