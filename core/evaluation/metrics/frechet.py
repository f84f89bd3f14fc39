"""Fréchet distance of two sets of features: FID.

Heusel et al. (arXiv 1706.08500), equation 6: ``‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁C₂)^½)``. With ``X`` the centred features
over ``√(n − 1)``, ``C = XᵀX``, and ``tr (C₁C₂)^½`` is the sum of the singular values of ``X₁X₂ᵀ``, ``(n, m)``.

torchmetrics' ``FrechetInceptionDistance``, which a test compares this with, takes the eigenvalues of the ``(d, d)``
product ``C₁C₂`` instead. That product is singular with fewer pictures than features, as in every evaluation here with
Inception's 2,048: 64 pictures then took 20 s instead of 0.04 s on one CPU core, with a relative error of 1e-5 and a
distance below 0 for equal sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import RequestError

__all__ = ["FID", "fid"]


@dataclass(frozen=True)
class FID:
    """The distance ``value`` of ``n`` pictures from ``n_reference`` others by features of ``width``.

    ``note`` warns, and is empty where nothing is to be said.
    """

    value: float
    n: int
    n_reference: int
    width: int
    note: str = ""

    def as_dict(self) -> dict[str, float | int | str]:
        return {
            "value": self.value,
            "n": self.n,
            "n_reference": self.n_reference,
            "width": self.width,
            "note": self.note,
        }


def check_features(features: Tensor, reference: Tensor, fewest: int) -> None:
    """Raise :class:`RequestError`, in words, unless both are ``(n, d)`` of one width, finite, and of enough rows."""
    for one in (features, reference):
        if one.ndim != 2 or one.shape[1] == 0:
            raise RequestError(f"Features must be (pictures, width), and these are {tuple(one.shape)}.")
        if len(one) < fewest:
            raise RequestError(f"A distance of two sets of pictures needs at least {fewest} in each, not {len(one)}.")
        if not bool(torch.isfinite(one).all()):
            raise RequestError("The features hold values that are not finite numbers.")
    if features.shape[1] != reference.shape[1]:
        raise RequestError(
            f"Features of {features.shape[1]} and {reference.shape[1]} numbers cannot be compared: take both from the "
            "same extractor."
        )


def fid(features: Tensor, reference: Tensor) -> FID:
    """FID of ``features`` ``(n, d)`` from ``reference`` ``(m, d)``, in fp64.

    It is biased upwards by some ``1/n``: compare values of equal ``n`` only. Raises :class:`RequestError` for fewer
    than two rows, other widths or values that are not finite.
    """
    check_features(features, reference, 2)
    (mean, spread), (mean_reference, spread_reference) = (_moments(one) for one in (features, reference))
    shared = torch.linalg.svdvals(spread @ spread_reference.T).sum()
    value = (
        (mean - mean_reference).square().sum() + spread.square().sum() + spread_reference.square().sum() - 2 * shared
    )
    width, fewest = features.shape[1], min(len(features), len(reference))
    note = ""
    if fewest <= width:
        note = (
            f"{fewest} pictures are fewer than the {width + 1} that features of width {width} need for a covariance of "
            "full rank: the value is much too high in itself, and good for comparing sets of this size only."
        )
    # of equal sets rounding may leave a little below 0
    return FID(max(float(value), 0.0), len(features), len(reference), width, note)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(d,)`` and a factor ``(k, d)``, ``k ≤ d``, whose Gram matrix is the covariance."""
    wide = features.detach().double().cpu()
    mean = wide.mean(0)
    centred = (wide - mean) / (len(wide) - 1) ** 0.5
    return mean, torch.linalg.qr(centred).R if len(wide) > wide.shape[1] else centred
