"""The embedded models in the shapes of SDXL and Flux: a concept is forgotten in them, and what it takes is measured."""

from __future__ import annotations

import pytest
from tiny import fit

from forget_concept.core import mini
from forget_concept.core.evaluation import (
    NEGATIVE,
    PATCHED,
    UNEDITED,
    EvaluationTarget,
    SamplingSettings,
    evaluate,
)
from forget_concept.core.models.text_entries import POOLED
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

OTHERS = [name for name in mini.NAMES if name != "mini"]
STAR = ForgetRequest((Concept("star", replacement="circle"),), preserve=("moon", "house", "tree", "heart", "crown"))


@pytest.mark.skipif(not OTHERS, reason="the package has no other embedded model")
@pytest.mark.parametrize("name", OTHERS)
def test_a_star_is_forgotten_and_the_rest_stays(name: str) -> None:
    """And where a model is drawn with at CFG 1, a negative prompt does nothing, which is what the patch is for."""
    model = mini.load(name=name)
    patch = fit(model, STAR)
    pooled = {entry.key for entry in model.survey.entries if entry.stream == POOLED}
    assert pooled and pooled <= set(patch.factors)
    sampling = SamplingSettings(steps=8, guidance=model.guidance, threads=1)
    target = EvaluationTarget("star", ((patch, 1.0),))
    (found,) = evaluate(model, mini.load_probe(), [target], 16, 3, sampling, baselines=(UNEDITED, NEGATIVE))
    plain, patched, negative = (found.scores[variant] for variant in (UNEDITED, PATCHED, NEGATIVE))
    assert plain.ua.value <= 0.25
    assert patched.ua.value >= 0.9
    assert patched.ira.value >= plain.ira.value - 0.15 and patched.cra.value >= plain.cra.value - 0.15
    if model.guidance == 1:
        assert negative.ua.value == plain.ua.value
