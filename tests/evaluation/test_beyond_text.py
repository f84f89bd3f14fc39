"""Attacks that begin with images or change the sampler: what they start from, and what they find."""

from __future__ import annotations

import pytest
import torch
from tiny import fit, state_hash

from forget_concept.core.errors import ModelError, RequestError
from forget_concept.core.evaluation import SamplingSettings, Variant
from forget_concept.core.evaluation.attacks import (
    ATTACKS,
    BEYOND_TEXT,
    AttackBudget,
    ProbeJudge,
    Target,
    run_attacks,
)
from forget_concept.core.evaluation.attacks.context import AttackContext
from forget_concept.core.evaluation.attacks.latent_inversion import invert_latents
from forget_concept.core.evaluation.attacks.run import _select_attacks
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.sampling_start import ExtraNoise, Start
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

SMALL = AttackBudget("small", 6, 1, 4, 4, 2, 2, 2, 0.1, 2, 1, 2, 4, 2, noises=2)
SAMPLING = SamplingSettings(steps=6, precision="float32", threads=1)


class Gaussian(LatentDiffusion):
    """The exact model of images whose latents are independent normal values of standard deviation ``spread``."""

    spread = 1.0

    def predict_noise(self, x, timesteps, states):
        signal, noise = self._levels(timesteps.expand(x.shape[0]), x)
        return noise / (signal**2 * self.spread**2 + noise**2) * x


@pytest.fixture(scope="module")
def gaussian(embedded):
    model, _ = embedded
    return Gaussian(model.unet, model.text, sd_alphas_cumprod(), latent_shape=(4, 16, 16))


@pytest.fixture(scope="module")
def patch(embedded):
    return fit(embedded[0], ForgetRequest((Concept("star", replacement="circle"),), ("moon",)))


def drawn(model, start=None, until=None, count=2, **more):
    prompts, seeds = ["a red star", "a blue moon"][:count], [3, 4][:count]
    return model.sample(prompts, seeds, steps=6, guidance=2.0, until=until, start=start, **more)


# -- the sampler --------------------------------------------------------------------------------------------------


def test_a_run_that_is_interrupted_goes_on_to_the_same_latents(embedded):
    model, _ = embedded
    half = drawn(model, until=3)
    assert torch.equal(drawn(model, Start(half, 3, noised=False)), drawn(model))


def test_an_image_depends_on_its_own_start_whatever_the_batch(embedded):
    model, _ = embedded
    half = drawn(model, until=3)
    every = drawn(model, Start(half, 3, noised=False), batch=1)
    assert torch.allclose(every, drawn(model, Start(half, 3, noised=False)), atol=1e-4)
    noisy = drawn(model, noise=ExtraNoise(1.0), batch=1)
    assert torch.allclose(noisy, drawn(model, noise=ExtraNoise(1.0)), atol=1e-3)
    assert not torch.allclose(noisy, drawn(model), atol=0.1)


def test_no_noise_is_the_sampler_without_it(embedded):
    assert torch.allclose(drawn(embedded[0], noise=ExtraNoise(0.0)), drawn(embedded[0]), atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_compensated_noise_keeps_the_distribution_and_more_variance_does_not(gaussian, eta):
    def deviation(noise):
        return float(gaussian.sample([""] * 8, range(8), steps=200, guidance=1.0, noise=noise).std())

    assert deviation(ExtraNoise(eta)) == pytest.approx(1, abs=0.02)
    if eta:
        # the excess of the last steps stays
        assert deviation(ExtraNoise(eta, 1.5)) > deviation(ExtraNoise(eta)) + 0.02


def test_what_the_mask_keeps_is_kept_and_the_rest_is_drawn(embedded):
    model, _ = embedded
    clean, mask = drawn(model), torch.zeros(16, 16)
    mask[:, 8:] = 1
    found = model.sample(["a blue moon"] * 2, [8, 9], steps=6, guidance=2.0, start=Start(clean, mask=mask))
    signal, noise = model.noise_levels(model.timesteps(6, model.spacing), 6, model.spacing, 0.0)[-1]
    kept = signal * clean + noise * model.initial_noise([8, 9])
    assert torch.allclose(found[..., :8], kept[..., :8], atol=1e-6)
    assert not torch.allclose(found[..., 8:], kept[..., 8:], atol=0.3)


def test_noise_is_refused_where_the_sampler_cannot_add_it(embedded):
    model, _ = embedded
    with pytest.raises(RequestError, match="ddim"):
        drawn(model, noise=ExtraNoise(1.0), sampler="dpm++")
    flow = LatentDiffusion(model.unet, model.text, None, "flow", latent_shape=model.latent_shape)
    with pytest.raises(RequestError, match="flow"):
        drawn(flow, noise=ExtraNoise(1.0))
    with pytest.raises(ModelError, match="flow"):
        run_attacks(flow, (), Target.embedded("star"), Sees(), SMALL, attacks=["noise_probe"], sampling=SAMPLING)
    chosen, left_out = _select_attacks(flow, Target.embedded("star"), None, beyond_text=True)
    assert list(left_out) == ["noise_probe"] and set(chosen) == {*ATTACKS, *BEYOND_TEXT} - {"noise_probe"}
    assert set(_select_attacks(flow, Target.embedded("star"), None, beyond_text=False)[0]) == set(ATTACKS)


class Sees:
    description = "everything"

    def shows(self, images):
        return [True] * len(images)


# -- the attacks --------------------------------------------------------------------------------------------------


def test_inverted_latents_draw_the_same_image_again(gaussian):
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = invert_latents(gaussian, latents, 200)
    again = gaussian.sample([""] * 4, range(4), steps=200, guidance=1.0, start=Start(noise, noised=False))
    assert torch.allclose(again, latents, atol=0.05)
    assert noise.std() == pytest.approx(1, abs=0.05)


def test_inversion_on_the_embedded_model_finds_its_own_images(embedded):
    model, probe = embedded
    seeds = list(range(4))
    latents = model.sample(["a red star"] * 4, seeds, steps=12, guidance=2.5)
    noise = invert_latents(model, latents, 20)
    again = model.sample([""] * 4, seeds, steps=20, guidance=1.0, start=Start(noise, noised=False))
    assert sum(label.object == "star" for label in probe.classify(model.decode(again))) >= 3


@pytest.mark.parametrize("name", list(BEYOND_TEXT))
def test_the_unedited_model_is_a_bound_and_the_model_comes_back(embedded, patch, name):
    model, probe = embedded
    before = state_hash(model.unet)
    report = run_attacks(
        model, ((patch, 1.0),), Target.embedded("star"), ProbeJudge(probe, "star"), SMALL, attacks=[name],
        sampling=SAMPLING,
    )  # fmt: skip
    (found,) = report.results
    assert found.attack == name and found.before is not None
    assert found.before.value >= 0.6
    assert found.after.value < found.before.value
    assert found.after.n == SMALL.pictures
    assert state_hash(model.unet) == before


def test_they_run_on_request_alone(embedded):
    model, probe = embedded
    names = ["rephrased", "completion"]
    found = run_attacks(
        model, (), Target(Concept("star"), ("star",), ("a shape",)), Sees(), SMALL, attacks=names, sampling=SAMPLING
    )
    assert [one.attack for one in found.results] == names
    assert not set(BEYOND_TEXT) & set(ATTACKS)
    with pytest.raises(RequestError, match="latent_inversion"):
        run_attacks(model, (), Target.embedded("star"), ProbeJudge(probe, "star"), attacks=["unknown"])


def test_every_amount_of_noise_is_drawn_and_one_that_shows_it_counts(embedded):
    model, _ = embedded

    class Third:
        """Finds the concept in every third image of the first amount, and in none of the second."""

        description = "third"

        def __init__(self):
            self.calls = 0

        def shows(self, images):
            self.calls += 1
            return [self.calls == 1 and i % 3 == 0 for i in range(len(images))]

    judge = Third()
    target = Target(Concept("star"), ("a red star",))
    found = run_attacks(model, (), target, judge, SMALL, attacks=["noise_probe"], sampling=SAMPLING)
    assert judge.calls == SMALL.noises
    assert found.results[0].after.value == pytest.approx(2 / 6)
    assert found.results[0].cost.pictures == SMALL.noises * SMALL.pictures


def test_completion_starts_from_what_the_unedited_model_drew(embedded, patch):
    model, _ = embedded
    context = AttackContext(
        model, Variant(((patch, 1.0),)), Target.embedded("star"), Sees(), torch.empty(0), SMALL, SAMPLING, 0
    )
    found = BEYOND_TEXT["completion"](context, None)
    assert found.start.first == 1 and not found.start.noised
    assert len(found.start.latents) == SMALL.pictures
