"""The loop: the model comes back bit for bit on every way out; guards, cancel, determinism."""

from __future__ import annotations

import pytest
import torch
from tiny import flags, forward, rand, state_hash, tiny_model

from forget_concept.core.errors import Cancelled, ForgetConceptError, ModelError, RequestError
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.patch.low_rank import LowRank
from forget_concept.core.patch.patch import Patch
from forget_concept.core.training import loop as training
from forget_concept.core.training.adapters import Deltas
from forget_concept.core.training.frozen import frozen
from forget_concept.core.training.loop import Checkpoint, Term, TrainingSettings, train
from forget_concept.core.training.losses import noise_matching


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def deltas_of(model, rank=2, which=("to_q", "to_k", "to_v", "to_out")):
    return Deltas(model, [s.key(w) for s in model.survey for w in which], rank, seeded())


class Plain:
    """An objective without memory, from a function of the step."""

    def __init__(self, terms):
        self.terms = terms

    def __call__(self, step):
        return self.terms(step)

    def state(self):
        return {}

    def restore(self, state):
        pass


def objective(model):
    x, t, states = rand(2, 4, 8, 8), torch.tensor([100, 800]), model.text.encode(["a star", ""])
    wanted = rand(2, 4, 8, 8, seed=3)
    return Plain(lambda step: {"fit": Term(noise_matching(model.predict_noise(x, t, states), wanted))})


@pytest.mark.parametrize("rank", [2, None])
def test_training_lowers_the_loss_and_its_factors_are_the_change(model, rank):
    deltas = deltas_of(model, rank)
    base = forward(model.unet)
    with deltas.attached():
        assert torch.equal(forward(model.unet), base)  # nothing is changed before the first step
    events = []
    train(model, deltas, objective(model), TrainingSettings(8, 5e-3), events.append)
    # each step is told once, and between them Cancel is looked at
    assert events[0].step == 0 and events[0].loss is None and len(events) == 1 + 2 * 8
    events = [event for event in events if event.terms]
    assert events[-1].loss < 0.97 * events[0].loss
    assert [e.step for e in events] == list(range(1, 9)) and events[0].terms["fit"] == pytest.approx(events[0].loss)
    with deltas.attached():
        trained = forward(model.unet)
        with deltas.using("base"):
            assert torch.equal(forward(model.unet), base)
    with Patch(deltas.factors()).applied(model.unet):
        torch.testing.assert_close(forward(model.unet), trained, atol=2e-5, rtol=1e-3)
    assert float((trained - base).abs().max()) > 1e-3
    assert max(f.rank for f in deltas.factors(1).values()) == 1


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("way", ["success", "error in a term", "cancel", "not finite", "error in progress"])
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
        return {"fit": Term(found["fit"].value, float("nan") if step == 2 and way == "not finite" else 1.0)}

    def progress(event):
        if event.step == 2 and way in ("cancel", "error in progress"):
            raise Cancelled if way == "cancel" else Broken

    expected = {
        "error in a term": Broken,
        "error in progress": Broken,
        "cancel": Cancelled,
        "not finite": ForgetConceptError,
    }.get(way)

    def run():
        train(model, deltas_of(model), Plain(terms), TrainingSettings(3, 1e-2), progress)

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
        poisoned = Plain(lambda step: {"x": Term(Poison.apply(good(step)["fit"].value))})
        train(model, deltas, poisoned, TrainingSettings(3, 1e-2))
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
            Plain(lambda step, g=good: {"x": Term(g(step)["fit"].value, 1e3)}),
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
    with torch.inference_mode(), frozen(model.unet):
        deltas = deltas_of(model)
        train(model, deltas, good, TrainingSettings(2, 1e-2))
        assert Patch(deltas.factors()).max_abs() > 0


def test_what_cannot_be_trained_is_said(model):
    with pytest.raises(ModelError, match="nothing to train"):
        Deltas(model, [], 2, seeded())
    with pytest.raises(ModelError, match=r"no projection 'x\.to_k'"):
        Deltas(model, ["x.to_k"], 2, seeded())
    with pytest.raises(ForgetConceptError, match="does not depend"):
        train(model, deltas_of(model), Plain(lambda step: {"x": Term(torch.ones(()))}), TrainingSettings(1, 1e-3))


def test_half_precision_models_train_in_full_precision_deltas():
    model = tiny_model()
    model.unet.bfloat16()
    deltas = deltas_of(model)
    events = []
    train(model, deltas, objective(model), TrainingSettings(6, 1e-2), events.append)
    events = [event for event in events if event.terms]
    assert events[-1].loss < events[0].loss
    assert all(p.dtype == torch.float32 for p in deltas.parameters())


# -- forgetting against keeping -----------------------------------------------------------------------------------


def two_sides(model):
    """Opposed on purpose: the same prediction is drawn to one place and to another."""
    x, t, states = rand(2, 4, 8, 8), torch.tensor([100, 800]), model.text.encode(["a star", ""])
    wanted = rand(2, 4, 8, 8, seed=3)
    with torch.no_grad():
        other = 2 * model.predict_noise(x, t, states) - wanted + 0.5 * rand(2, 4, 8, 8, seed=4)

    def terms(step):
        predicted = model.predict_noise(x, t, states)
        return {
            "forget": Term(noise_matching(predicted, wanted), 3.0),
            "keep": Term(noise_matching(predicted, other), side="retain"),
        }

    return Plain(terms)


def test_the_restricted_rule_is_the_papers_formula_on_both_sides(model):
    deltas = deltas_of(model, rank=None, which=("to_k",))
    good = two_sides(model)
    with frozen(model.unet), deltas.attached():
        terms = good(1)
        sides = [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(terms[n].weighted, deltas.parameters(), retain_graph=True)]
            )
            for n in ("forget", "keep")
        ]
    f, r = sides
    s = f @ r
    assert s < 0
    wanted = (f - s / (r @ r) * r) + (r - s / (f @ f) * f)
    train(model, deltas, good, TrainingSettings(1, 1e-3, optimiser="sgd", gradient="restricted"))
    moved = -torch.cat([p.detach().flatten() for p in deltas.parameters()]) / 1e-3
    torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-6 * float(wanted.norm()))


def test_the_restricted_step_ascends_neither_side_under_adam(model):
    """First order, for the step really made; with the sum at least one side would rise."""

    def made(rule):
        deltas = deltas_of(model, rank=None, which=("to_k", "to_v"))
        good = two_sides(model)
        with frozen(model.unet), deltas.attached():
            terms = good(1)
            sides = [
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(terms[n].value, deltas.parameters(), retain_graph=True)]
                )
                for n in ("forget", "keep")
            ]
        train(model, deltas, good, TrainingSettings(1, 1e-3, gradient=rule))
        step = torch.cat([p.detach().flatten() for p in deltas.parameters()])
        return [float(side @ step) / float(side.norm() * step.norm()) for side in sides]

    assert max(made("sum")) > 0.01
    assert max(made("restricted_step")) < 1e-5


class Valley:
    """Forgetting pulls the first delta one way; keeping is a parabola along it, as steep as it is told, with noise."""

    def __init__(self, deltas, steepness):
        self.deltas, self.steepness = deltas, steepness
        self.generator = seeded()
        self.seen = []

    def state(self):
        return {"generator": self.generator.get_state()}

    def restore(self, state):
        self.generator.set_state(state["generator"])

    def __call__(self, step):
        noise = float(torch.rand((), generator=self.generator))
        at = self.deltas.parameters()[0].flatten()[:2]
        forget = (3 - at[0]).square() + (1 + noise) * 1e-3 * (1 - at[1])
        keep = self.steepness * (at[1] - 1e-3).square() + (1 + noise) * 1e-2 * at[0].square()
        if torch.is_grad_enabled():
            self.seen.append(noise)
        return {"forget": Term(forget, 1.0, "forget"), "keep": Term(keep, 1.0, "retain")}

    def losses(self, state):
        after = self.state()
        self.restore(state)
        with torch.no_grad():
            found = [float(term.value) for term in self(1).values()]
        self.restore(after)
        return found


@pytest.mark.parametrize("backtracks, rises", [(0, True), (2, False)])
def test_a_step_that_raised_a_loss_is_halved(model, monkeypatch, backtracks, rises):
    """Adam's first step overshoots the valley of what is kept; half of it does not, and no draw is another one."""
    monkeypatch.setattr(training, "BACKTRACKS", backtracks)
    deltas = deltas_of(model, rank=None, which=("to_k",))
    valley = Valley(deltas, steepness=50.0)
    state = valley.state()
    before = valley.losses(state)
    train(model, deltas, valley, TrainingSettings(1, 3e-3, gradient="restricted_step"))
    after = valley.losses(state)
    assert after[0] < before[0]
    assert (after[1] > before[1]) == rises
    assert float(deltas.parameters()[0].detach().abs().max()) > 3e-4
    drawn = torch.rand(2, generator=seeded())
    assert valley.seen == [float(drawn[0])] and float(torch.rand((), generator=valley.generator)) == float(drawn[1])


@pytest.mark.parametrize("rule", ["restricted", "restricted_step"])
def test_a_rule_for_two_sides_needs_both(model, rule):
    with pytest.raises(RequestError, match=f"'{rule}'.*retain"):
        train(model, deltas_of(model), objective(model), TrainingSettings(1, 1e-3, gradient=rule))


# -- what earlier requests left, and directions not to be touched -----------------------------------------------


def test_earlier_requests_stay_on_and_can_be_taken_off(model):
    sites = model.survey.sites
    shared, own = sites[0].key("to_k"), sites[1].key("to_v")
    earlier = Patch(
        {
            key: LowRank(0.1 * rand(*shape[:1], 2), rand(2, *shape[1:]))
            for key, shape in (
                (shared, tuple(model.survey.linear(shared).weight.shape)),
                (own, tuple(model.survey.linear(own).weight.shape)),
            )
        }
    )
    base = forward(model.unet)
    with earlier.applied(model.unet):
        before = forward(model.unet)
    deltas = Deltas(model, [shared, sites[2].key("to_q")], 2, seeded(), earlier)
    with torch.no_grad():
        for parameter in deltas.parameters():
            parameter.add_(0.1)
    with torch.no_grad(), deltas.attached():
        now = forward(model.unet)
        with deltas.using("earlier"):
            torch.testing.assert_close(forward(model.unet), before)
        with deltas.using("base"):
            assert torch.equal(forward(model.unet), base)
    with Patch.combined([(earlier, 1.0), (Patch(deltas.factors()), 1.0)]).applied(model.unet):
        torch.testing.assert_close(forward(model.unet), now, atol=2e-5, rtol=1e-3)
    assert set(deltas.factors()) == set(deltas.keys)  # the earlier part is not trained again


@pytest.mark.parametrize("rank", [2, None])
def test_blind_directions_move_nothing(model, rank):
    key = model.survey.sites[0].key("to_k")
    basis = torch.linalg.qr(rand(32, 5))[0]
    deltas = Deltas(model, [key], rank, seeded(), null_space={key: basis})
    train(model, deltas, objective(model), TrainingSettings(5, 1e-2))
    change = deltas.factors()[key].delta()
    assert float(change.norm()) > 1e-3 and float((change @ basis).norm()) < 1e-5 * float(change.norm())
    torch.testing.assert_close(deltas.delta(key).detach(), change)
    with deltas.attached():
        trained = forward(model.unet)
    with Patch(deltas.factors()).applied(model.unet):
        torch.testing.assert_close(forward(model.unet), trained, atol=1e-5, rtol=1e-4)


# -- cut short and gone on with ----------------------------------------------------------------------------------


class Drawing(Plain):
    """An objective that draws its noise from a generator of its own."""

    def __init__(self, model):
        self.model, self.generator = model, seeded(7)
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        x = torch.randn(1, 4, 8, 8, generator=self.generator)
        predicted = self.model.predict_noise(x, torch.tensor([500]), self.model.text.encode(["a star"]))
        return {"fit": Term(noise_matching(predicted, x * 0))}

    def state(self):
        return {"generator": self.generator.get_state()}

    def restore(self, state):
        self.generator.set_state(state["generator"])


class Failing(Drawing):
    """Breaks in step 5, after its noise has been drawn."""

    def __call__(self, step):
        found = super().__call__(step)
        if step == 5:
            raise Broken
        return found


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("drawing", [Drawing, Failing])
def test_a_training_goes_on_where_it_was_cut_short(tmp_path, drawing, optimiser):
    settings = TrainingSettings(6, 1e-2, weight_decay=0.01, optimiser=optimiser)
    checkpoint = Checkpoint(Workspace(tmp_path), "k")

    def run(drawing=Drawing, progress=None, checkpoint=None):
        model = tiny_model()
        deltas, drawn = deltas_of(model), drawing(model)
        train(model, deltas, drawn, settings, progress, checkpoint=checkpoint)
        return drawn.calls, [p.detach().clone() for p in deltas.parameters()]

    def cancel(event):
        if event.step == 4:
            raise Cancelled

    _, whole = run()
    with pytest.raises((Cancelled, Broken)):
        run(drawing, cancel if drawing is Drawing else None, checkpoint)
    calls, parts = run(checkpoint=checkpoint)
    assert calls == 2
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))
    assert checkpoint.workspace.load("training", "k") is None  # done: nothing to go on with


def cancelled_after(step):
    def cancel(event):
        if event.step == step:
            raise Cancelled

    return cancel


STRANGE = {
    "done": lambda found: found | {"done": torch.tensor(10**9)},
    "negative": lambda found: found | {"done": torch.tensor(-5)},
    "none": lambda found: {name: value for name, value in found.items() if name != "done"},
    "several": lambda found: found | {"done": torch.tensor([1, 2])},
    "optimiser": lambda found: {n: v for n, v in found.items() if not n.startswith("optimiser.0.exp")},
    "optimisers": lambda found: {n: v for n, v in found.items() if not n.startswith("optimiser.")},
    "step": lambda found: found | {"optimiser.0.step": torch.tensor(7.0)},
    "shape": lambda found: found | {"parameter.0": torch.zeros(1)},
    "more": lambda found: found | {"parameter.99": torch.zeros(1)},
    "named": lambda found: found | {"optimiser.x.step": torch.tensor(1.0)},
    "generator": lambda found: found | {"objective.generator": torch.zeros(3, dtype=torch.uint8)},
    "no-objective": lambda found: {n: v for n, v in found.items() if not n.startswith("objective.")},
    "told": lambda found: found | {"told.0.fit": torch.zeros(1, dtype=torch.float64)},
    "told-named": lambda found: found | {"told.x": torch.zeros(4)},
}


@pytest.mark.parametrize("change", STRANGE)
def test_a_strange_checkpoint_is_left_out_and_the_training_begins_anew(tmp_path, caplog, change):
    settings = TrainingSettings(6, 1e-2)
    checkpoint = Checkpoint(Workspace(tmp_path), "k")

    def run(progress=None, checkpoint=checkpoint):
        model = tiny_model()
        deltas, drawn = deltas_of(model), Drawing(model)
        told = train(model, deltas, drawn, settings, progress, checkpoint=checkpoint)
        return drawn.calls, told, [p.detach().clone() for p in deltas.parameters()]

    _, told, whole = run(checkpoint=None)
    with pytest.raises(Cancelled):
        run(cancelled_after(4))
    found = checkpoint.workspace.load("training", "k")
    checkpoint.workspace.save("training", "k", STRANGE[change](found))
    with caplog.at_level("WARNING"):
        calls, again, parts = run()
    assert calls == 6 and "made anew" in caplog.text
    assert again == told and all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


def test_a_training_that_went_on_reports_what_a_whole_one_does(tmp_path):
    settings = TrainingSettings(6, 1e-2)
    checkpoint = Checkpoint(Workspace(tmp_path), "k")
    for progress in (cancelled_after(2), cancelled_after(3), None):
        model = tiny_model()
        try:
            again = train(model, deltas_of(model), Drawing(model), settings, progress, checkpoint=checkpoint)
        except Cancelled:
            continue
    model = tiny_model()
    whole = train(model, deltas_of(model), Drawing(model), settings)
    assert repr(again) == repr(whole)


def test_a_long_training_is_kept_on_the_way_too(model, tmp_path):
    checkpoint = Checkpoint(Workspace(tmp_path), "k", every=2)
    seen = []

    def look(event):
        if event.terms:
            found = checkpoint.workspace.load("training", "k")
            seen.append(None if found is None else int(found["done"]))

    train(model, deltas_of(model), Drawing(model), TrainingSettings(5, 1e-2), look, checkpoint=checkpoint)
    assert seen == [None, 2, 2, 4, 4]


def test_the_report_has_the_terms_of_the_first_and_last_steps(model):
    told = train(model, deltas_of(model), two_sides(model), TrainingSettings(10, 5e-3))
    assert set(told.first) == set(told.last) == {"forget", "keep"} and told.steps == 10
    assert told.last["forget"] < told.first["forget"]
