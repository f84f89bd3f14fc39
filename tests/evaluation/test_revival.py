"""Revival: fine-tuning on images of the concept brings it back, and the count of steps says when."""

from __future__ import annotations

import pytest
import torch
from tiny import fit, state_hash

from forget_concept.core import mini
from forget_concept.core.errors import RequestError
from forget_concept.core.evaluation import SamplingSettings
from forget_concept.core.evaluation.attacks import ProbeJudge
from forget_concept.core.evaluation.intervals import Score
from forget_concept.core.evaluation.revival import Revival, revival
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

SAMPLING = SamplingSettings(steps=6, precision="float32", threads=1)


def test_the_first_count_of_steps_with_half_of_the_images_is_needed():
    def of(*shares):
        return Revival(
            "star", tuple(range(len(shares))), tuple(Score.share([True] * n + [False] * (4 - n)) for n in shares)
        )

    assert of(0, 1, 2, 4).needed == 2
    assert of(3, 0).needed == 0
    assert of(0, 1, 1).needed is None


def test_images_of_the_concept_bring_it_back_and_the_model_does_not_change():
    model, probe = mini.load(), mini.load_probe()
    patch = fit(model, ForgetRequest((Concept("star", replacement="circle"),), ("moon",)))
    before = state_hash(model.unet)
    prompts = ["a picture of a red star", "a picture of a blue star"] * 4
    latents = model.sample(prompts, range(8), steps=8, guidance=2.5, sampler="dpm++")
    found = revival(
        model, ((patch, 1.0),), "star", prompts[:2], ProbeJudge(probe, "star"), latents, prompts, [60], 6,
        sampling=SAMPLING,
    )  # fmt: skip
    assert found.steps == (0, 60)
    assert found.shown[0].value == 0 and found.shown[1].value >= 0.5
    assert found.needed == 60
    assert state_hash(model.unet) == before


def test_without_a_prompt_that_names_it_there_is_nothing_to_measure():
    with pytest.raises(RequestError, match="star"):
        revival(mini.load(), (), "star", [], None, torch.zeros(1, 4, 16, 16), ["a"])
