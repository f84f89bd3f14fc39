"""Fisher information: the exact one against autograd, the estimators unbiased by enumeration, files and flags."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import flags, rand, state_hash, tiny_model

from forget_concept.core.errors import Cancelled, ModelError, RequestError
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.training.fisher import FisherSettings, FisherSum, fisher_information, fisher_key, square_of_sum

PROMPTS = ["a photo of a star", "a blue house"]


def some_keys(model, sites=(0, 6)):
    return [model.survey.sites[i].key(which) for i in sites for which in ("to_k", "to_out")]


def on(device, **changes):
    model = tiny_model(**changes)
    model.unet.to(device)
    return model


def measured(model, settings, latents=None, samples=2):
    """A FisherSum of some samples, and the latents."""
    latents = rand(samples, *model.latent_shape, seed=3) if latents is None else latents
    total = FisherSum(model, some_keys(model), settings)
    for n in range(samples):
        total.add(latents[n : n + 1], model.text.encode([PROMPTS[n % 2]]))
    return total


def assert_same(found, wanted, **tolerance):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, msg=lambda m, key=key: f"{key}: {m}", **tolerance)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_exact_is_the_square_of_autograds_own_gradient(device, prediction):
    """The definition, with the weights themselves made trainable and one time step a pass."""
    model = on(device, prediction_type=prediction)
    settings = FisherSettings("exact", times=5, batch=2)
    total = measured(model, settings)
    latents = rand(2, *model.latent_shape, seed=3).to(device)
    other = on(device, prediction_type=prediction)
    weights = {key: other.survey.linear(key).weight.requires_grad_() for key in some_keys(other)}
    wanted = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    for n in range(2):
        total.count = n  # the noise of sample n
        gradient = {key: torch.zeros_like(weight) for key, weight in weights.items()}
        for row, time in enumerate(total.times):
            noise = total._noise(row)[None].to(device)
            x = other.add_noise(latents[n : n + 1], noise, torch.tensor([time]))
            predicted = other.predict_noise(x, torch.tensor([time]), other.text.encode([PROMPTS[n]]))
            for key, part in zip(
                weights, torch.autograd.grad(((predicted - noise) ** 2).mean(), list(weights.values())), strict=True
            ):
                gradient[key] += part / 5
        for key in wanted:
            wanted[key] += gradient[key] ** 2 / 2
    total.count = 2
    scale = max(float(value.max()) for value in wanted.values())
    found = total.result()
    assert found.negative == 0 and found.added == 0 and found.samples == 2
    assert_same(found.values, {k: v.detach().cpu() for k, v in wanted.items()}, rtol=1e-3, atol=1e-6 * scale)


def test_the_time_steps_are_spread_evenly_over_the_schedule():
    assert FisherSettings("exact", times=4).time_steps(1000) == [125, 375, 625, 875]
    assert FisherSettings().time_steps(1000) == list(range(1000))


def sums(gradients, size, drawn):
    """Sum, halves' difference and the sum of squared pair differences of drawn (first, second) places."""
    pairs = [(gradients[k * size + a], gradients[k * size + b]) for k, (a, b) in enumerate(drawn)]
    first, second = sum(a for a, _ in pairs), sum(b for _, b in pairs)
    return first + second, (first - second) ** 2, sum((a - b) ** 2 for a, b in pairs)


@pytest.mark.parametrize(("steps", "draws"), [(2, 1), (4, 1), (6, 2), (6, 3), (8, 2)])
def test_stratified_estimators_are_unbiased_over_every_possible_draw(steps, draws):
    size = steps // draws
    gradients = rand(steps, 5, seed=steps, dtype=torch.float64) + 0.3
    truth = gradients.sum(0) ** 2
    halves, pairs, naive, product = [], [], [], []
    for drawn in itertools.product(itertools.permutations(range(size), 2), repeat=draws):
        total, difference, apart = sums(gradients, size, drawn)
        halves.append(square_of_sum(total, difference, size))
        pairs.append(square_of_sum(total, apart, size))
        naive.append((size / 2) ** 2 * total**2)
        product.append(size**2 * (total**2 - difference) / 4)
    exactly = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(torch.stack(halves).mean(0), truth, **exactly)
    torch.testing.assert_close(torch.stack(pairs).mean(0), truth, **exactly)
    # what the others miss it by: (L/2)² (1 − 2/L) 2 Σ s² too much, L Σ s² too little
    s2 = gradients.view(draws, size, 5).var(1).sum(0)
    torch.testing.assert_close(torch.stack(naive).mean(0), truth + size * (size - 2) / 2 * s2, **exactly)
    torch.testing.assert_close(torch.stack(product).mean(0), truth - size * s2, **exactly)
    # the mean over the ways to share out what was drawn cannot scatter more
    spread = [torch.stack(found).var(0, unbiased=False) for found in (pairs, halves)]
    assert (spread[0] <= spread[1] * (1 + 1e-12) + 1e-20).all()


@pytest.mark.parametrize(("steps", "draws"), [(4, 1), (5, 2), (6, 2), (6, 3)])
def test_halves_without_strata_are_unbiased_too(steps, draws):
    gradients = rand(steps, 5, seed=steps + 1, dtype=torch.float64) - 0.2
    found = []
    for first in itertools.combinations(range(steps), draws):
        left = [t for t in range(steps) if t not in first]
        for second in itertools.combinations(left, draws):
            a, b = gradients[list(first)].sum(0), gradients[list(second)].sum(0)
            found.append(square_of_sum(a + b, (a - b) ** 2, steps / draws))
    torch.testing.assert_close(torch.stack(found).mean(0), gradients.sum(0) ** 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("estimator", "strata"), [("halves", 2), ("pairs", 1)])
def test_on_a_model_the_mean_over_every_draw_is_the_exact_one(estimator, strata, monkeypatch):
    model, times = tiny_model(), 3 * strata
    latents = rand(1, *model.latent_shape, seed=3)
    exact = measured(model, FisherSettings("exact", times=times), latents, samples=1).result().values
    draws = list(itertools.product(itertools.permutations(range(3), 2), repeat=strata))
    mean = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in exact.items()}
    for drawn in draws:
        rows = [3 * k + place for k, pair in enumerate(drawn) for place in pair]
        monkeypatch.setattr(FisherSum, "_draw_steps", lambda self, sample, rows=rows: rows)
        total = measured(model, FisherSettings(estimator, times=times, draws=strata), latents, samples=1)
        for key in mean:  # before clamping, which is not unbiased
            mean[key] += total.state()[key].double() / len(draws)
    scale = max(float(value.max()) for value in exact.values())
    assert_same({k: v.float() for k, v in mean.items()}, exact, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("estimator", ["halves", "pairs"])
def test_with_every_step_drawn_the_estimate_is_the_exact_one(device, estimator):
    model = on(device)
    exact = measured(model, FisherSettings("exact", times=8)).result().values
    found = measured(model, FisherSettings(estimator, times=8, draws=4)).result()
    scale = max(float(value.max()) for value in exact.values())
    assert found.negative == 0 and found.added == 0
    assert_same(found.values, exact, rtol=1e-3, atol=1e-6 * scale)


def test_a_draw_takes_two_different_steps_of_every_stratum_each_equally_often():
    total = FisherSum(tiny_model(), some_keys(tiny_model()), FisherSettings("halves", times=20, draws=5))
    seen = torch.zeros(5, 4, 4)
    for sample in range(600):
        for k, (a, b) in enumerate(zip(*[iter(total._draw_steps(sample))] * 2, strict=True)):
            assert a // 4 == b // 4 == k and a != b
            seen[k, a % 4, b % 4] += 1
    # 50 of each of the 12 ordered pairs are expected, give or take 7
    assert seen.diagonal(dim1=1, dim2=2).sum() == 0
    assert (seen + 50 * torch.eye(4)).sub(50).abs().max() < 5 * 50**0.5


@pytest.mark.parametrize("estimator", ["exact", "halves", "pairs"])
def test_how_many_steps_go_through_at_once_changes_nothing(device, estimator):
    model = on(device)
    one, other = (
        measured(model, FisherSettings(estimator, times=12, draws=3, batch=batch)).state() for batch in (2, 5)
    )
    scale = max(float(value.abs().max()) for key, value in one.items() if key != "samples")
    assert_same(one, other, rtol=1e-3, atol=1e-5 * scale)


def test_clamping_is_counted():
    model = tiny_model()
    total = measured(model, FisherSettings("halves", draws=1))
    raw = torch.cat([value.flatten() for key, value in total.state().items() if key != "samples"]).double() / 2
    found = total.result()
    kept = torch.cat([value.flatten() for value in found.values.values()]).double()
    assert (raw < 0).any() and torch.equal(kept, raw.clamp(min=0).float().double())
    assert found.negative == pytest.approx(float((raw < 0).double().mean()))
    assert found.added == pytest.approx(float((kept.sum() - raw.sum()) / raw.sum()), rel=1e-4)


def test_a_half_precision_model_loses_no_gradient():
    """Unscaled, most gradients of a mean fall below what fp16 can hold."""
    try:
        one = torch.ones(1, 1, dtype=torch.float16)
        torch.nn.functional.layer_norm(torch.nn.functional.linear(one, one), (1,))
    except RuntimeError:  # torch before 2.3
        pytest.skip("this torch cannot compute in fp16 on the CPU")
    full, half = tiny_model(), tiny_model()
    half.unet.half()
    settings = FisherSettings("exact", times=4)
    latents = 1e-3 * rand(2, *full.latent_shape, seed=3)
    exact, found = (measured(m, settings, latents).result().values for m in (full, half))
    for key, value in exact.items():
        assert found[key].dtype == torch.float32
        assert (found[key] == 0).sum() <= (value == 0).sum() + value.numel() // 100
        torch.testing.assert_close(found[key].sum(), value.sum(), rtol=0.05, atol=0)


class Counter:
    """How many rows a UNet was given; optionally cancels after some progress."""

    def __init__(self, model, stop=None):
        self.rows, self.stop = 0, stop
        self.handle = model.unet.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.rows += len(args[0])

    def progress(self, event):
        if self.stop is not None and "Fisher" in event.message and event.step == self.stop:
            raise Cancelled("stop")


SMALL = {"times": 8, "draws": 1, "sample_steps": 2, "guidance": 1.0}


def test_what_was_cancelled_is_gone_on_with_bit_for_bit(tmp_path):
    model = tiny_model()
    keys, settings = some_keys(model), FisherSettings("halves", samples=11, **SMALL)
    whole = fisher_information(model, keys, PROMPTS, settings)
    before, before_flags = state_hash(model.unet), flags(model.unet)
    counter = Counter(model, stop=5)
    with pytest.raises(Cancelled):
        fisher_information(model, keys, PROMPTS, settings, workspace=Workspace(tmp_path), progress=counter.progress)
    counter.handle.remove()
    assert (state_hash(model.unet), flags(model.unet)) == (before, before_flags)
    counter = Counter(model)
    found = fisher_information(model, keys, PROMPTS, settings, workspace=Workspace(tmp_path))
    # 2 chunks of 8 pictures in 2 steps, and 2 time steps for each of the 6 samples that were left
    assert counter.rows == 2 * 8 * 2 + 6 * 2
    assert found.samples == 11
    assert_same(found.values, whole.values, rtol=0, atol=0)


def test_a_finished_file_takes_no_pass_and_more_samples_add_to_it(tmp_path):
    model, space = tiny_model(), Workspace(tmp_path)
    keys = some_keys(model)
    few, more = (FisherSettings("halves", samples=samples, **SMALL) for samples in (4, 6))
    first = fisher_information(model, keys, PROMPTS, few, workspace=space)
    counter = Counter(model)
    again = fisher_information(model, keys, PROMPTS, few, workspace=space)
    assert counter.rows == 0
    assert_same(again.values, first.values, rtol=0, atol=0)
    longer = fisher_information(model, keys, PROMPTS, more, workspace=space)
    assert counter.rows == 8 * 2 + 2 * 2
    assert_same(longer.values, fisher_information(tiny_model(), keys, PROMPTS, more).values, rtol=0, atol=0)
    # a file of more samples does not change what fewer give, and is not lost
    assert_same(fisher_information(model, keys, PROMPTS, few, workspace=space).values, first.values, rtol=0, atol=0)
    name = fisher_key(model, keys, PROMPTS, few)
    assert space.metadata("fisher", name)["samples"] == "6"


def test_a_file_of_another_model_is_refused(tmp_path):
    model, other, space = tiny_model(), tiny_model(seed=1), Workspace(tmp_path)
    keys, settings = some_keys(model), FisherSettings("halves", samples=1, **SMALL)
    fisher_information(other, keys, PROMPTS, settings, workspace=space)
    assert fisher_key(model, keys, PROMPTS, settings) != fisher_key(other, keys, PROMPTS, settings)
    theirs = space.path("fisher", fisher_key(other, keys, PROMPTS, settings))
    theirs.rename(space.path("fisher", fisher_key(model, keys, PROMPTS, settings)))
    with pytest.raises(ModelError, match="measured on another model than 'tiny'"):
        fisher_information(model, keys, PROMPTS, settings, workspace=space)


def test_a_state_of_other_projections_is_refused():
    model = tiny_model()
    state = FisherSum(model, some_keys(model), FisherSettings()).state()
    with pytest.raises(ModelError, match="not of the chosen projections"):
        FisherSum(model, some_keys(model, (0, 1)), FisherSettings()).restore(state)


def test_in_a_hosts_inference_mode_it_is_the_same():
    model = tiny_model()
    settings = FisherSettings("halves", samples=2, **SMALL)
    wanted = fisher_information(model, some_keys(model), PROMPTS, settings)
    with torch.inference_mode():
        found = fisher_information(model, some_keys(model), PROMPTS, settings)
    assert_same(found.values, wanted.values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"estimator": "naive"}, "not known"),
        ({"samples": 0}, "at least 1"),
        ({"batch": 1}, "at least 2"),
        ({"times": 2000}, "1000 time steps"),
        ({"draws": 3}, "divides 1000"),
        ({"times": 4, "draws": 4}, "at most half"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, words):
    model = tiny_model()
    with pytest.raises(RequestError, match=words):
        FisherSum(model, some_keys(model), FisherSettings(**changes))


def test_too_few_pictures_and_no_prompts_are_refused():
    model = tiny_model()
    with pytest.raises(RequestError, match="do not make 4 samples"):
        fisher_information(
            model, some_keys(model), PROMPTS, FisherSettings(samples=4), latents=rand(3, *model.latent_shape)
        )
    with pytest.raises(RequestError, match="at least one prompt"):
        fisher_information(model, some_keys(model), [], FisherSettings(samples=4))


def test_a_sample_that_was_cancelled_in_the_middle_is_not_added():
    """The exact estimator makes hundreds of passes for a sample, and each can be cancelled."""
    model = tiny_model()
    settings = FisherSettings("exact", samples=2, times=8, batch=2)
    latent, states = rand(1, *model.latent_shape), model.text.encode(["a star"])
    total, wanted = FisherSum(model, some_keys(model), settings), FisherSum(model, some_keys(model), settings)
    wanted.add(latent, states)
    looks = 0

    def cancel(event):
        nonlocal looks
        looks += 1
        if looks == 3:
            raise Cancelled

    before, before_flags = state_hash(model.unet), flags(model.unet)
    with pytest.raises(Cancelled):
        total.add(latent, states, cancel)
    assert (state_hash(model.unet), flags(model.unet)) == (before, before_flags)
    assert total.count == 0
    total.add(latent, states)
    assert_same(total.result().values, wanted.result().values, rtol=0, atol=0)
