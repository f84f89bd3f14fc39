"""Fine-tuning with a LoRA: it learns what it is shown, from a patched model too, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from tiny import flags, rand, random_patch, state_hash, tiny_model

from forget_concept.core.errors import RequestError
from forget_concept.core.training.fine_tuning import FineTuningSettings, fine_tune

LATENTS = rand(3, 4, 8, 8)
PROMPTS = ["a photo of a cup", "a photo of a boat", "a house"]


def loss(model, patches) -> float:
    """Denoising loss on the images at fixed noise and times."""
    times, noise = torch.tensor([100, 400, 800]), rand(3, 4, 8, 8, seed=5)
    x = model.add_noise(LATENTS, noise, times)
    entered = [patch.applied(model.survey) for patch in patches]
    for one in entered:
        one.__enter__()
    with torch.no_grad():
        found = float((model.predict_noise(x, times, model.text.encode(PROMPTS)) - noise).square().mean())
    for one in reversed(entered):
        one.__exit__(None, None, None)
    return found


def test_it_learns_the_images_beside_a_patch_and_the_model_comes_back():
    model = tiny_model()
    earlier = random_patch(model.survey, scale=0.2)
    before, flagged = state_hash(model.unet), flags(model.unet)
    found = fine_tune(model, LATENTS, PROMPTS, [40, 5], FineTuningSettings(lr=5e-3), earlier=earlier)
    assert list(found) == [5, 40]
    assert (state_hash(model.unet), flags(model.unet)) == (before, flagged)
    assert set(found[40].factors) == set(model.survey.layers)
    assert {factor.rank for factor in found[40].factors.values()} <= set(range(1, 9))
    losses = [loss(model, [earlier]), loss(model, [earlier, found[5]]), loss(model, [earlier, found[40]])]
    assert losses[2] < losses[1] < losses[0]


def test_a_milestone_is_what_a_shorter_run_ends_with_and_the_seed_decides():
    model = tiny_model()
    long, short = (fine_tune(model, LATENTS, PROMPTS, steps, seed=3) for steps in ([3, 6], [3]))
    other = fine_tune(model, LATENTS, PROMPTS, [3], seed=4)
    for key, factor in short[3].factors.items():
        assert torch.equal(factor.up, long[3].factors[key].up)
    assert any(not torch.equal(factor.up, other[3].factors[key].up) for key, factor in short[3].factors.items())


def test_bad_input_is_refused_in_words():
    model = tiny_model()
    for latents, prompts, steps, word in (
        (LATENTS, PROMPTS[:2], [1], "3 images and 2 prompts"),
        (LATENTS[:0], [], [1], "0 images"),
        (LATENTS, PROMPTS, [], "at least one step"),
        (LATENTS, PROMPTS, [0, 2], "at least one step"),
    ):
        with pytest.raises(RequestError, match=word):
            fine_tune(model, latents, prompts, steps)
    for wrong in ({"rank": 0}, {"lr": 0.0}, {"batch_size": 0}):
        with pytest.raises(RequestError):
            FineTuningSettings(**wrong)
