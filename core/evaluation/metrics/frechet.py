"""Fréchet distance (FID) of two sets of features: ``‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁C₂)^½)``.

With ``X`` the centered features divided by ``√(n − 1)``, ``C = XᵀX``, and ``tr (C₁C₂)^½`` is the sum of the singular
values of ``X₁X₂ᵀ``, ``(n, m)``.

torchmetrics' ``FrechetInceptionDistance``, which a test compares this with, computes the eigenvalues of the ``(d, d)``
product ``C₁C₂`` instead. That product is singular with fewer images than features, as in every evaluation here with
Inception's 2,048 features: for 64 images it took 20 s instead of 0.04 s on one CPU core, with a relative error of 1e-5
and a negative distance for equal sets.

Reference: Heusel et al., arXiv 1706.08500, equation 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import RequestError

__all__ = ["FID", "fid"]


@dataclass(frozen=True)
class FID:
    """The distance ``value`` of ``n`` images from ``n_reference`` others, with features of ``width`` dimensions.

    ``note`` is a warning about the value, or empty.
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


def check_features(features: Tensor, reference: Tensor, min_rows: int) -> None:
    """Raise :class:`RequestError` unless both are finite, of equal width, and have at least ``min_rows`` rows."""
    for one in (features, reference):
        if one.ndim != 2 or one.shape[1] == 0:
            raise RequestError(f"Features must have the shape (images, width), not {tuple(one.shape)}.")
        if len(one) < min_rows:
            raise RequestError(f"A distance of two image sets needs at least {min_rows} images each, not {len(one)}.")
        if not bool(torch.isfinite(one).all()):
            raise RequestError("The features contain values that are not finite: check the images.")
    if features.shape[1] != reference.shape[1]:
        raise RequestError(
            f"Features of width {features.shape[1]} and {reference.shape[1]} cannot be compared: use the "
            "same extractor for both."
        )


def fid(features: Tensor, reference: Tensor) -> FID:
    """Compute the FID of two sets of features, in fp64. It has an upward bias of order ``1/n``: compare equal ``n``.

    Args:
        features: Features ``(n, d)``.
        reference: Reference features ``(m, d)``.

    Raises:
        RequestError: If a set has fewer than two rows, the widths differ, or a value is not finite.

    Reference: Heusel et al., arXiv 1706.08500, equation 6.
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
            f"{fewest} images are fewer than the {width + 1} that features of width {width} need for a covariance of "
            "full rank: the value is much too high, and only comparable between sets of this size."
        )
    # of equal sets rounding may leave a little below 0
    return FID(max(float(value), 0.0), len(features), len(reference), width, note)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(d,)`` and a factor ``(k, d)``, ``k ≤ d``, whose Gram matrix is the covariance."""
    wide = features.detach().double().cpu()
    mean = wide.mean(0)
    centred = (wide - mean) / (len(wide) - 1) ** 0.5
    return mean, torch.linalg.qr(centred).R if len(wide) > wide.shape[1] else centred
