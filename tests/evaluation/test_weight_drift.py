"""Relative weight change of a model without cross-attention."""

from __future__ import annotations

import torch
from transformers_of_diffusers import SMALL

from forget_concept.core.evaluation.report.contents import Drift
from forget_concept.core.evaluation.report.plots import bars
from forget_concept.core.evaluation.weight_drift import weight_drift
from forget_concept.core.formats import context_map
from forget_concept.core.models.survey import survey
from forget_concept.core.patch.low_rank import LowRank


def test_of_a_transformer_each_layer_that_reads_text_has_its_own() -> None:
    small = next(one for one in SMALL if one.family == "flux")
    found = survey(small.make())
    width = found.width("tokens")
    assert width is not None
    patch = context_map.expand({"tokens": LowRank(torch.randn(width, 2), torch.randn(2, width))}, found)
    drift = weight_drift(found, patch)
    (edited,) = patch.factors
    changed, kept = found.linear(edited).weight, [e.module.weight for e in found.entries if e.key != edited]
    size = patch.factors[edited].delta().norm()
    torch.testing.assert_close(drift.sites[edited], float(size / changed.norm()), rtol=1e-4, atol=0)
    every = torch.stack([weight.norm() for weight in (changed, *kept)]).norm()
    torch.testing.assert_close(drift.whole, float(size / every), rtol=1e-4, atol=0)
    assert set(drift.sites) == {entry.key for entry in found.entries}
    assert drift.elsewhere == 0
    assert len(bars(Drift("", drift.sites)).bars) == len(found.entries)
