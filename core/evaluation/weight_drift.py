"""Relative weight change ``‖ΔW‖ / ‖W‖`` (Frobenius norm) of a patch, per cross-attention site.

Continual unlearning fails when the drift from the base weights compounds (arXiv 2511.07970). ``ΔW = U V`` is never
materialized: ``‖U V‖² = Σ (UᵀU) ∘ (V Vᵀ)`` needs only rank × rank products, which are computed in fp64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..models.model_survey import PROJECTIONS, ModelSurvey
from ..patch.low_rank import LowRank
from ..patch.patch import Patch, survey_of

__all__ = ["WeightDrift", "change_norm", "weight_drift"]


@dataclass(frozen=True)
class WeightDrift:
    """Relative weight changes, each ``‖ΔW‖ / ‖W‖``.

    Attributes:
        projections: Per changed weight, by its canonical key.
        sites: Per cross-attention site, over its four projections, or of a model without any per layer that reads text;
            0 for an unchanged one.
        whole: Over all of these, changed or not.
        elsewhere: Over the changed weights outside of them; 0 if there are none.
    """

    projections: Mapping[str, float]
    sites: Mapping[str, float]
    whole: float
    elsewhere: float = 0.0

    def as_dict(self) -> dict[str, object]:
        return {
            "whole": self.whole,
            "elsewhere": self.elsewhere,
            "sites": dict(self.sites),
            "projections": dict(self.projections),
        }


def weight_drift(unet: nn.Module | ModelSurvey, patch: Patch, strength: float = 1.0) -> WeightDrift:
    """Compute the relative weight change of a model under a patch, from the patch's factors.

    Args:
        unet: The UNet, or its survey.
        patch: The patch.
        strength: Factor on the patch.

    Returns:
        The :class:`WeightDrift`.

    Raises:
        PatchError: If the patch does not fit the model, or it changes a layer whose weights are all zero.
    """
    survey = survey_of(unet)
    patch.check_fits(survey)
    of_site = {site.name: [site.key(which) for which in PROJECTIONS] for site in survey}
    of_site = of_site or {entry.key: [entry.key] for entry in survey.entries}
    inside = [key for keys in of_site.values() for key in keys]
    base = {key: _norm(survey.linear(key).weight) for key in inside}
    change: dict[str, float] = {}
    for key, factor in patch.factors.items():
        change[key] = abs(strength) * change_norm(factor)
        if key not in base:
            base[key] = _norm(survey.linear(key).weight)
        if base[key] == 0:
            raise PatchError(
                f"The model's weights at {key} are all zero, so their relative change is undefined: use a checkpoint "
                "with trained weights there."
            )

    def together(keys: list[str]) -> float:
        whole = sum(base[key] ** 2 for key in keys)
        return (sum(change.get(key, 0.0) ** 2 for key in keys) / whole) ** 0.5 if whole else 0.0

    outside = sorted(set(change) - set(inside))
    return WeightDrift(
        {key: size / base[key] for key, size in change.items()},
        {name: together(keys) for name, keys in of_site.items()},
        together(inside),
        together(outside),
    )


def change_norm(factor: LowRank) -> float:
    """Return the Frobenius norm ``‖U V‖`` of a low-rank change without computing the product."""
    up, down = (t.detach().double().cpu() for t in (factor.up, factor.down))
    # rounding may leave a slightly negative sum when the factors cancel
    return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight.detach().float().cpu(), dtype=torch.float64))
