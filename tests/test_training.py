"""The loop: the model comes back bit for bit on every way out; guards, cancel, determinism."""

from __future__ import annotations

import pytest
import torch
from tiny import flags, forward, rand, state_hash, tiny_model

from forget_concept.core.errors import Cancelled, ForgetConceptError, ModelError
from forget_concept.core.losses import noise_matching
from forget_concept.core.patch import Patch
from forget_concept.core.training import Deltas, TrainingSettings, borrowed, train


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def deltas_of(model, rank=2, which=("to_q", "to_k", "to_v", "to_out")):
    return Deltas(model, [s.key(w) for s in model.survey for w in which], rank, seeded())


def objective(model):
    x, t, states = rand(2, 4, 8, 8), torch.tensor([100, 800]), model.text.encode(["a star", ""])
    wanted = rand(2, 4, 8, 8, seed=3)
    return lambda step: {"fit": (1.0, noise_matching(model.predict_noise(x, t, states), wanted))}


@pytest.mark.parametrize("rank", [2, None])
def test_training_lowers_the_loss_and_its_factors_are_the_change(model, rank):
    deltas = deltas_of(model, rank)
    base = forward(model.unet)
    with deltas.attached():
        assert torch.equal(forward(model.unet), base)  # nothing is changed before the first step
    events = []
    train(model, deltas, objective(model), TrainingSettings(8, 5e-3), events.append)
    assert events[-1].loss < 0.97 * events[0].loss
    assert [e.step for e in events] == list(range(1, 9)) and events[0].terms["fit"] == pytest.approx(events[0].loss)
    with deltas.attached():
        trained = forward(model.unet)
        with deltas.disabled():
            assert torch.equal(forward(model.unet), base)
    with Patch(deltas.factors()).applied(model.unet):
        torch.testing.assert_close(forward(model.unet), trained, atol=2e-5, rtol=1e-3)
    assert float((trained - base).abs().max()) > 1e-3
    assert max(f.rank for f in deltas.factors(1).values()) == 1


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("way", ["success", "error in a term", "cancel", "stop", "not finite", "error in progress"])
@pytest.mark.parametrize("as_found", ["trainable", "frozen and training"])
def test_the_model_comes_back_bit_for_bit(model, way, as_found):
    if as_found == "trainable":
        model.unet.mid_block.train()
    else:
        model.unet.train().requires_grad_(False)
        model.unet.conv_in.requires_grad_(True)
    before, flagged = state_hash(model.unet), flags(model.unet)
    good = objective(model)

    def terms(step):
        assert not any(p.requires_grad for p in model.unet.parameters()) and not model.unet.training
        if step == 2 and way == "error in a term":
            raise Broken
        found = good(step)
        return {"fit": (float("nan") if step == 2 and way == "not finite" else 1.0, found["fit"][1])}

    def progress(event):
        if event.step == 2 and way in ("cancel", "error in progress"):
            raise Cancelled if way == "cancel" else Broken

    expected = {
        "error in a term": Broken,
        "error in progress": Broken,
        "cancel": Cancelled,
        "stop": Cancelled,
        "not finite": ForgetConceptError,
    }.get(way)
    stops = iter([False, True])

    def run():
        stop = (lambda: next(stops)) if way == "stop" else None
        train(model, deltas_of(model), terms, TrainingSettings(3, 1e-2), progress, stop)

    if expected is None:
        run()
    else:
        with pytest.raises(expected):
            run()
    assert state_hash(model.unet) == before and flags(model.unet) == flagged
    assert all(p.grad is None for p in model.unet.parameters())


def test_a_gradient_that_is_not_finite_makes_no_step(model):
    deltas = deltas_of(model)
    good = objective(model)

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    with pytest.raises(ForgetConceptError, match=r"step 1: a gradient.*0\.01"):
        train(model, deltas, lambda step: {"x": (1.0, Poison.apply(good(step)["fit"][1]))}, TrainingSettings(3, 1e-2))
    assert all(torch.isfinite(p).all() for p in deltas.parameters())
    assert Patch(deltas.factors()).max_abs() == 0


def test_gradients_are_clipped_in_every_mode(model):
    """(The authors' did nothing in one of theirs.) Adam hides a scale, so the gradients themselves are looked at."""
    for rank in (2, None):
        deltas = deltas_of(model, rank)
        good = objective(model)
        train(
            model,
            deltas,
            lambda step, g=good: {"x": (1e3, g(step)["fit"][1])},
            TrainingSettings(1, 1e-3, clip_norm=0.5),
        )
        norm = torch.stack([p.grad.norm() for p in deltas.parameters()]).norm()
        assert float(norm) == pytest.approx(0.5, rel=1e-3)


def test_the_same_seed_gives_the_same_result():
    results = []
    for seed in (0, 0, 1):
        model = tiny_model()
        deltas = Deltas(model, [model.survey.sites[0].key("to_k")], 2, seeded(seed))
        train(model, deltas, objective(model), TrainingSettings(3, 1e-2))
        results.append(deltas.parameters()[1].detach().clone())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_it_works_inside_a_hosts_inference_mode(model):
    """ComfyUI runs every node so; the weights here are ordinary ones (a host's adapter sees to that)."""
    good = objective(model)
    with torch.inference_mode(), borrowed(model.unet):
        deltas = deltas_of(model)
        train(model, deltas, good, TrainingSettings(2, 1e-2))
        assert Patch(deltas.factors()).max_abs() > 0


def test_what_cannot_be_trained_is_said(model):
    with pytest.raises(ModelError, match="nothing to train"):
        Deltas(model, [], 2, seeded())
    with pytest.raises(ModelError, match=r"no projection 'x\.to_k'"):
        Deltas(model, ["x.to_k"], 2, seeded())
    with pytest.raises(ForgetConceptError, match="does not depend"):
        train(model, deltas_of(model), lambda step: {"x": (1.0, torch.ones(()))}, TrainingSettings(1, 1e-3))


def test_half_precision_models_train_in_full_precision_deltas():
    model = tiny_model()
    model.unet.bfloat16()
    deltas = deltas_of(model)
    events = []
    train(model, deltas, objective(model), TrainingSettings(6, 1e-2), events.append)
    assert events[-1].loss < events[0].loss
    assert all(p.dtype == torch.float32 for p in deltas.parameters())
