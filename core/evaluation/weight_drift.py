"""How far a patch moves the weights, site by site: ``‖ΔW‖ / ‖W‖`` in the Frobenius norm.

Drift from the base is what destroys continual unlearning when it compounds (arXiv 2511.07970). ``ΔW = U V`` is never
built: ``‖U V‖² = Σ (UᵀU) ∘ (V Vᵀ)``, sums of the rank's size, in fp64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..models.unet import PROJECTIONS, UNetSurvey
from ..patch.low_rank import LowRank
from ..patch.patch import Patch, survey_of

__all__ = ["WeightDrift", "change_norm", "weight_drift"]


@dataclass(frozen=True)
class WeightDrift:
    """Relative changes, each ``‖ΔW‖ / ‖W‖``.

    - ``projections``: of every weight that the patch changes, by its canonical key;
    - ``sites``: of every cross-attention of the model by its name, its four projections together, 0 where untouched;
    - ``whole``: of all cross-attentions together, changed or not;
    - ``elsewhere``: of what the patch changes outside of them, together; 0 where that is nothing.
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


def weight_drift(unet: nn.Module | UNetSurvey, patch: Patch, strength: float = 1.0) -> WeightDrift:
    """The drift of a model's weights under a patch, from the patch's factors.

    Raises :class:`PatchError` where the patch does not fit the model, or the model has a layer of zeros there.
    """
    survey = survey_of(unet)
    patch.check_fits(survey)
    base = {key: _norm(survey.linear(key).weight) for site in survey for key in map(site.key, PROJECTIONS)}
    change: dict[str, float] = {}
    for key, factor in patch.factors.items():
        change[key] = abs(strength) * change_norm(factor)
        if key not in base:
            base[key] = _norm(survey.linear(key).weight)
        if base[key] == 0:
            raise PatchError(f"The model's weights at {key} are all zero, so a change of them has no relative size.")

    def together(keys: list[str]) -> float:
        whole = sum(base[key] ** 2 for key in keys)
        return (sum(change.get(key, 0.0) ** 2 for key in keys) / whole) ** 0.5 if whole else 0.0

    of_site = {site.name: [site.key(which) for which in PROJECTIONS] for site in survey}
    inside = [key for keys in of_site.values() for key in keys]
    outside = sorted(set(change) - set(inside))
    return WeightDrift(
        {key: size / base[key] for key, size in change.items()},
        {name: together(keys) for name, keys in of_site.items()},
        together(inside),
        together(outside),
    )


def change_norm(factor: LowRank) -> float:
    """``‖U V‖`` of a low-rank change, without the product."""
    up, down = (t.detach().double().cpu() for t in (factor.up, factor.down))
    # of parts that cancel each other, rounding may leave a little below 0
    return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight.detach().float().cpu(), dtype=torch.float64))
