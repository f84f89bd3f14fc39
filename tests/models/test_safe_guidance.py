"""Safe Latent Diffusion: the paper's equations element by element, in a plain loop, and as diffusers computes them."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from drawn import DrawnModel, DrawnProbe, labels_named_in
from hypothesis import given
from hypothesis import strategies as st
from tiny import flags, rand, state_hash, tiny_model

from forget_concept.core.errors import Cancelled, RequestError
from forget_concept.core.evaluation import (
    NEGATIVE,
    PATCHED,
    SAFE,
    UNEDITED,
    EvaluationTarget,
    Picture,
    SamplingSettings,
    Variant,
    draw,
    evaluate,
    target_questions,
)
from forget_concept.core.mini.vocabulary import NONE
from forget_concept.core.models.safe_guidance import SAFETY, SafetyGuidance, SafetySettings, safety_term

STAR = SafetyGuidance("a star")
numbers = st.floats(-2, 2, allow_subnormal=False, width=32)


# -- the term -----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=12),
    st.sampled_from([*SAFETY.values(), SafetySettings(0.7, -0.1, 0, 1.0, 0.2)]),
)
def test_the_term_is_the_papers_element_by_element(rows, settings):
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    term, after = safety_term(*columns[:3], settings, columns[3])
    for i, (prompt, empty, unsafe, momentum) in enumerate(rows):
        phi = settings.scale * (prompt - unsafe)
        mu = min(1.0, abs(phi)) if prompt - unsafe < settings.threshold else 0.0
        gamma = mu * (unsafe - empty) + settings.momentum * momentum
        assert float(term[i]) == pytest.approx(gamma, abs=1e-12)
        assert float(after[i]) == pytest.approx(settings.beta * momentum + (1 - settings.beta) * gamma, abs=1e-12)


def test_the_weight_is_clipped_at_one_and_zero_far_from_the_concept():
    settings = SafetySettings(8.0, 1 / 16, 0, 0, 0)
    apart = torch.tensor([-3.0, -1 / 8, -1 / 16, 0.0, 1 / 32, 1 / 16, 1 / 8, 3.0], dtype=torch.float64)
    unsafe = torch.full_like(apart, 2.0)
    term, _ = safety_term(unsafe + apart, unsafe - 1, unsafe, settings, torch.zeros_like(apart))
    # ε_S - ε is 1, so that the term is μ itself; what lies at λ or above is left alone
    assert term.tolist() == [1, 1, 0.5, 0, 0.25, 0, 0, 0]


def test_no_scale_or_a_threshold_below_every_difference_is_no_guidance():
    parts = [rand(2, 4, 8, 8, seed=i) for i in range(3)]
    zero = torch.zeros_like(parts[0])
    for settings in (replace(SAFETY["max"], scale=0.0), replace(SAFETY["max"], threshold=-math.inf)):
        term, after = safety_term(*parts, settings, zero)
        assert not term.any()
        assert not after.any()
    # a threshold of 0, as the weak configuration has it, still guides where the concept's prediction is above
    term, _ = safety_term(*parts, SAFETY["weak"], zero)
    assert 0.3 < float((term != 0).float().mean()) < 0.7


@pytest.mark.parametrize("name", ["weak", "medium", "strong", "max"])
def test_every_step_is_diffusers_own(name):
    places = ("diffusers.pipelines.stable_diffusion_safe", "diffusers.pipelines.deprecated.stable_diffusion_safe")
    safe = importlib.import_module(next(place for place in places if importlib.util.find_spec(place)))
    settings, published = SAFETY[name], dict(getattr(safe.SafetyConfig, name.upper()))
    assert settings.first_step(50) == published.pop("sld_warmup_steps")
    scale = published.pop("sld_guidance_scale")
    assert settings.scale == (200 if name == "weak" else scale)
    assert tuple(published.values()) == (settings.threshold, settings.momentum, settings.beta)
    mine, theirs = torch.zeros(2, 4, 8, 8), None
    for step in range(20):
        text, empty, unsafe = (0.05 * rand(2, 4, 8, 8, seed=3 * step + i) for i in range(3))
        guidance, theirs = safe.StableDiffusionPipelineSafe.perform_safety_guidance(
            *(None, True, theirs, text - empty, [text, empty, unsafe], step, settings.scale, settings.first_step(50)),
            *(settings.threshold, settings.momentum, settings.beta),
        )
        term, mine = safety_term(text, empty, unsafe, settings, mine)
        torch.testing.assert_close(mine, theirs)
        used = step >= settings.first_step(50)
        torch.testing.assert_close(text - empty - term if used else text - empty, guidance)


# -- while sampling -----------------------------------------------------------------------------------------------


def reference(model, prompt, seed, steps, guidance, negative, concept, settings, warm):
    """DDIM in a plain loop, a picture at a time and a pass at a time, with the paper's equations."""
    prompt, negative, concept = (model.text.encode([words]) for words in (prompt, negative, concept))
    x = model.initial_noise([seed]).to(model.device)
    nu = torch.zeros_like(x)
    times = model.timesteps(steps)
    for k, t in enumerate(times):
        with torch.no_grad():
            e_p, e, e_s = (model.predict_noise(x, torch.tensor([t]), states) for states in (prompt, negative, concept))
        mu = torch.where(e_p - e_s < settings.threshold, (settings.scale * (e_p - e_s)).abs().clamp(max=1), 0.0)
        gamma = mu * (e_s - e) + settings.momentum * nu
        nu = settings.beta * nu + (1 - settings.beta) * gamma
        eps = e + guidance * (e_p - e - (0 if k < warm else gamma))
        now = model.alphas_cumprod[t]
        after = model.alphas_cumprod[max(t - model.train_steps // steps, 0)]
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = after.sqrt() * x0 + (1 - after).sqrt() * eps
    return x


OTHER = SafetySettings(3.0, 0.02, 0.45, 0.8, 0.3)


@pytest.mark.parametrize(
    ("settings", "guidance"), [(settings, 4.0) for settings in SAFETY.values()] + [(OTHER, 4.0), (OTHER, 1.0)]
)
def test_sampling_is_the_reference_loop(model, settings, guidance, device):
    model.unet.to(device)
    prompts, seeds = ["a red star", "a blue moon"], [3, 4]
    found = model.sample(
        *(prompts, seeds, 8, guidance, "blurred"),
        batch=1 if guidance == 1 else 2,
        safety=SafetyGuidance("a star", settings),
    )
    warm = {0.3: 2, 0.2: 2, 0.14: 1, 0.0: 0, 0.45: 4}[settings.warmup]
    for row, prompt, seed in zip(found, prompts, seeds, strict=True):
        expected = reference(model, prompt, seed, 8, guidance, "blurred", "a star", settings, warm)
        torch.testing.assert_close(row[None], expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_without_it_the_samples_are_as_before(model, sampler, guidance):
    """The loop as it was before it could be steered, kept here; it rounds in another order."""

    @torch.no_grad()
    def before(prompts, seeds, steps):
        x = model.initial_noise(seeds)
        guided = guidance != 1.0
        states = model.text.encode([*prompts, ""] if guided else prompts)
        context = states.index([0, 1, 2, 2] if guided else [0, 1])
        times = model.timesteps(steps)
        path = [float(model.alphas_cumprod[t]) for t in times]
        path.append(float(model.alphas_cumprod[max(times[-1] - model.train_steps // steps, 0)]))
        earlier = None
        for k in range(steps):
            twice = torch.cat([x, x]) if guided else x
            eps = model.predict_noise(twice, torch.full((len(twice),), times[k]), context)
            if guided:
                conditional, unconditional = eps.chunk(2)
                eps = unconditional + guidance * (conditional - unconditional)
            now, after = path[k], path[k + 1]
            ahead = x0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
            if sampler == "dpm++" and earlier is not None and k < steps - 1:
                snr = [0.5 * math.log(a / (1 - a)) for a in (path[k - 1], now, after)]
                ahead = x0 + (x0 - earlier) * ((snr[2] - snr[1]) / (2 * (snr[1] - snr[0])))
            earlier = x0
            share = ((1 - after) / (1 - now)) ** 0.5
            x = share * x + (after**0.5 - share * now**0.5) * ahead
        return x

    prompts, seeds = ["a red star", "a blue moon"], [7, 8]
    found = model.sample(prompts, seeds, 6, guidance, sampler=sampler)
    torch.testing.assert_close(found, before(prompts, seeds, 6), atol=2e-5, rtol=1e-5)


def test_a_term_of_zero_changes_nothing_and_a_real_one_does(model):
    def drawn(safety=None, guidance=3.0):
        return model.sample(["a red star", "a house"], [1, 2], 6, guidance, safety=safety)

    for guidance in (1.0, 3.0):
        none = SafetyGuidance("a star", replace(SAFETY["max"], scale=0.0))
        torch.testing.assert_close(drawn(none, guidance), drawn(None, guidance), atol=1e-4, rtol=1e-3)
    never = SafetyGuidance("a star", replace(SAFETY["max"], warmup=1.0))
    torch.testing.assert_close(drawn(never), drawn(), atol=1e-4, rtol=1e-3)
    moved = [float((drawn(SafetyGuidance.named("a star", name)) - drawn()).norm()) for name in ("weak", "max")]
    assert 1e-2 < moved[0] < moved[1]


def test_the_model_is_left_as_it_was_and_three_passes_are_made(model):
    before, flagged, rows = state_hash(model.unet), flags(model.unet), []
    handle = model.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    model.sample(["a star", "a house"], [1, 2], 3, safety=STAR)
    model.sample(["a star"], [1], 1, 1.0, safety=STAR)
    assert rows == [6, 6, 6, 3]

    def stop(event):
        raise Cancelled

    with pytest.raises(Cancelled):
        model.sample(["a star"], [1], 3, safety=STAR, progress=stop)
    handle.remove()
    assert (state_hash(model.unet), flags(model.unet)) == (before, flagged)


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(RequestError, match="name what to steer away from"):
        SafetyGuidance("  ")
    with pytest.raises(RequestError, match="'harsh' is not known: choose one of weak, medium, strong, max"):
        SafetyGuidance.named("star", "harsh")
    assert SafetyGuidance.named("star") == SafetyGuidance("star")
    for change, words in (
        ({"scale": -1.0}, "scale must be at least 0"),
        ({"scale": math.nan}, "scale must be"),
        ({"threshold": math.nan}, "threshold"),
        ({"warmup": 1.5}, "'warmup' must be 0 to 1"),
        ({"momentum": -0.1}, "'momentum'"),
        ({"beta": 2.0}, "'beta'"),
    ):
        with pytest.raises(RequestError, match=words):
            replace(SAFETY["medium"], **change)


# -- as a baseline ------------------------------------------------------------------------------------------------


class SteeredModel(DrawnModel):
    """Leaves out what it is steered away from, on every other seed."""

    def sample(self, prompts, seeds, steps=20, negative="", **rest):
        safety = rest.get("safety")
        if safety is not None:
            self.faults.append(
                lambda prompt, seed, labels: (
                    replace(labels, object=NONE) if labels.object == safety.concept and seed % 2 else labels
                )
            )
        try:
            return super().sample(prompts, seeds, steps, negative, **rest)
        finally:
            if safety is not None:
                self.faults.pop()


def test_it_is_a_baseline_where_it_is_asked_for():
    quick = SamplingSettings(steps=2, batch=16, precision="float32")

    def scores(**asked_for):
        (found,) = evaluate(SteeredModel(), DrawnProbe(), [EvaluationTarget("star", ())], 20, 0, quick, **asked_for)
        return found

    found = scores(baselines=(UNEDITED, NEGATIVE, SAFE))
    assert list(found.scores) == [PATCHED, UNEDITED, NEGATIVE, SAFE]
    odd = sum(q.seed % 2 for q in target_questions("star", 20))
    assert 0 < odd < 20
    assert found.scores[SAFE].ua.value == odd / 20
    assert found.scores[SAFE].ira.value == 1  # no kept prompt names the star
    assert found.drift[SAFE] == 0
    assert SAFE in found.as_dict()["scores"]
    assert set(scores().scores) == {PATCHED, UNEDITED, NEGATIVE}
    with pytest.raises(RequestError, match="baseline 'sld' is not known"):
        scores(baselines=("sld",))


def test_variants_are_told_apart_by_it():
    picture = [Picture("a red star", 4)]
    model = tiny_model()
    model.vae = type("Decoder", (), {"decode": staticmethod(lambda latents: latents[:, :3].tanh())})()
    drawn = {}
    for variant in (Variant(), Variant(safe=STAR), Variant(safe=SafetyGuidance.named("a star", "max"))):
        (drawn[variant.key],) = draw(model, picture, variant, SamplingSettings(4, 3.0, 2, "float32"))
    assert len(drawn) == 3
    first, *others = drawn.values()
    assert all(not torch.equal(first, other) for other in others)
    assert Variant(safe=STAR).key == Variant(safe=SafetyGuidance("a star")).key
    assert labels_named_in("a red star").object == "star"
