"""Erosion is counted against the base, picture by picture; drift of the weights is that of the weights themselves."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import DrawnModel, DrawnProbe, labels_named_in
from hypothesis import given
from hypothesis import strategies as st
from tiny import TinyText, flags, rand, random_patch, state_hash, tiny_model, tiny_unet

from forget_concept.core.errors import Cancelled, ForgetConceptError, PatchError, RequestError
from forget_concept.core.evaluation import (
    PATCHED,
    EvaluationTarget,
    SampleCache,
    SamplingSettings,
    evaluate,
    retain_questions,
)
from forget_concept.core.evaluation.erosion import erosion
from forget_concept.core.evaluation.weight_drift import change_norm, weight_drift
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.methods.sequence import History
from forget_concept.core.mini.vocabulary import CATEGORIES, NONE
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.schedules import sd_alphas_cumprod
from forget_concept.core.patch.low_rank import LowRank
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

QUICK = SamplingSettings(steps=3, batch=16, precision="float32")


# -- weights ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_the_norm_of_a_change_needs_no_product(rank, d_out, d_in, seed):
    factor = LowRank(rand(d_out, rank, seed=seed), rand(rank, d_in, seed=seed + 1))
    assert change_norm(factor) == pytest.approx(float(np.linalg.norm(factor.delta().double().numpy())), rel=1e-5)


def test_parts_that_cancel_leave_nothing():
    factor = LowRank(rand(8, 3), rand(3, 6, seed=1))
    assert change_norm(LowRank.cat([factor, factor.scaled(-1.0)])) == pytest.approx(0, abs=1e-6)


def test_weight_drift_is_the_edited_weights_against_the_base(model):
    patch = random_patch(model.survey, which=("to_k", "to_v", "to_out"))
    some = Patch({key: f for i, (key, f) in enumerate(patch.factors.items()) if i % 3}, patch.metadata)
    found = weight_drift(model.survey, some, 0.7)
    base, edited = model.unet.state_dict(), some.merged_state(model.survey, 0.7)
    change = dict.fromkeys([site.name for site in model.survey], 0.0)
    weight = dict(change)
    for site in model.survey:
        for which in ("to_q", "to_k", "to_v", "to_out"):
            path = site.weight_path(which) + ".weight"
            moved = float((edited.get(path, base[path]).double() - base[path].double()).norm())
            size = float(base[path].double().norm())
            change[site.name] += moved**2
            weight[site.name] += size**2
            if (key := site.key(which)) in some.factors:
                assert found.projections[key] == pytest.approx(moved / size, rel=1e-5)
    assert set(found.projections) == set(some.factors)
    assert dict(found.sites) == pytest.approx({n: (change[n] / weight[n]) ** 0.5 for n in change}, rel=1e-5)
    assert found.whole == pytest.approx((sum(change.values()) / sum(weight.values())) ** 0.5, rel=1e-5)
    assert found.elsewhere == 0
    assert weight_drift(model.survey, some, -0.7).whole == found.whole
    assert found.as_dict()["sites"] == found.sites


def test_weights_outside_of_the_cross_attentions_are_counted_apart(model):
    key = next(key for key in model.survey.layers if model.survey.split(key) is None)
    weight = model.survey.layers[key].module.weight.detach()
    inside = random_patch(model.survey, which=("to_k",))
    factor = LowRank(rand(weight.shape[0], 2), rand(2, weight.shape[1], seed=1))
    found = weight_drift(model.survey, Patch({**inside.factors, key: factor}))
    assert found.elsewhere == pytest.approx(float(factor.delta().norm() / weight.norm()), rel=1e-5)
    assert found.projections[key] == pytest.approx(found.elsewhere)
    assert found.whole == weight_drift(model.survey, inside).whole
    assert found.sites == weight_drift(model.survey, inside).sites


def test_weight_drift_of_what_does_not_fit_is_refused(model):
    other = tiny_model(cross_attention_dim=48)
    with pytest.raises(PatchError, match="another architecture"):
        weight_drift(model.survey, random_patch(other.survey))
    site = next(iter(model.survey))
    with torch.no_grad():
        site.projection("to_k").weight.zero_()
    with pytest.raises(PatchError, match="all zero"):
        weight_drift(model.survey, random_patch(model.survey))


# -- erosion ------------------------------------------------------------------------------------------------------


class TinyDrawn(LatentDiffusion):
    """A tiny model with real weights, whose pictures are drawn as they are asked for."""

    def __init__(self) -> None:
        super().__init__(tiny_unet(), TinyText(), sd_alphas_cumprod(), latent_shape=(4, 8, 8), name="tiny")
        self.drawn = DrawnModel()

    def sample(self, prompts, seeds, steps=30, *args, **kwargs):
        return self.drawn.sample(prompts, seeds, steps, **kwargs)

    def decode(self, latents, batch=16):
        return self.drawn.decode(latents, batch)


class FaultyPatch(Patch):
    """Real factors, and a fault of the pictures while it is on."""

    def but(self, drawn, fault):
        object.__setattr__(self, "_drawn", drawn)
        object.__setattr__(self, "_fault", fault)
        return self

    @contextmanager
    def applied(self, unet, strength=1.0):
        with super().applied(unet, strength):
            self._drawn.faults.append(self._fault)
            try:
                yield
            finally:
                self._drawn.faults.remove(self._fault)


def record(*names: str) -> dict[str, str]:
    concepts = tuple(Concept(name, _kind(name)) for name in names)
    return {"forget_concept.request": ForgetRequest(concepts).to_json(), "forget_concept.base_model": "x"}


def _kind(name: str) -> str:
    return next(kind for kind, words in CATEGORIES.items() if any(word.name == name for word in words))


def damage(every: int):
    """Loses every so many pictures' object and style, and one identity altogether."""

    def fault(prompt, seed, labels):
        if seed % every == 0:
            labels = replace(labels, object=NONE, style=NONE)
        return replace(labels, identity=NONE) if labels.identity == "Otto Brand" else labels

    return fault


@pytest.fixture()
def sequence():
    model = TinyDrawn()
    steps = []
    for number, (names, every) in enumerate(((("star",), 7), (("star", "neon"), 3))):
        patch = random_patch(model.survey, seed=number, scale=0.1 * (1 + number), metadata=record(*names))
        steps.append(FaultyPatch(patch.factors, patch.metadata).but(model.drawn, damage(every)))
    return model, steps


def test_erosion_is_what_the_base_draws_right_and_the_step_does_not(sequence):
    model, steps = sequence

    def weak(prompt, seed, labels):  # the base model's own mistakes
        return replace(labels, object="circle", style=NONE) if seed % 5 == 0 else labels

    model.drawn.faults.append(weak)
    before = state_hash(model.unet), flags(model.unet)
    found = erosion(model, DrawnProbe(), steps, 30, 4, QUICK)
    assert (state_hash(model.unet), flags(model.unet)) == before
    assert [one.step for one in found] == [1, 2]
    assert [one.forgotten for one in found] == [("star",), ("star", "neon")]
    questions = {c: retain_questions(c, 30, 4, ["star", "neon"]) for c in CATEGORIES}

    def right(question, step):
        labels = weak(question.prompt.text, question.seed, labels_named_in(question.prompt.text))
        if step is not None:
            labels = steps[step]._fault(question.prompt.text, question.seed, labels)
        return getattr(labels, question.category) == question.expected

    for step, one in enumerate(found):
        lost = total = 0
        for category, several in questions.items():
            was = sum(right(q, None) for q in several)
            still = sum(right(q, step) for q in several)
            score = one.by_category[category]
            assert score.value == pytest.approx(1 - still / was)
            assert score.low <= score.value <= score.high
            assert score.n == 30
            lost, total = lost + was - still, total + was
        assert one.erosion.value == pytest.approx(lost / total)
        assert one.erosion.n == 90
        assert one.by_concept["Otto Brand"] > 0
        assert set(one.by_concept) == {q.expected for several in questions.values() for q in several}
        assert one.weights == weight_drift(model.survey, steps[step])
    assert 0 < found[0].erosion.value < found[1].erosion.value
    assert 0 < found[0].distance < found[1].distance
    assert found[0].weights.whole < found[1].weights.whole
    assert found[0].perceptual is None


def test_the_distance_of_pictures_is_that_of_an_evaluation(sequence):
    """The same patch and the same kept prompts: one number, whichever way it is asked for."""
    model, steps = sequence
    cache = SampleCache(model, DrawnProbe(), QUICK)
    (found,) = erosion(model, DrawnProbe(), steps[:1], 24, 0, without=["neon"], cache=cache)
    calls = len(model.drawn.calls)
    subject = EvaluationTarget("star", ((steps[0], 1.0),))
    (other,) = evaluate(model, DrawnProbe(), [subject], 24, 0, without=["neon"], baselines=("unedited",), cache=cache)
    assert len(model.drawn.calls) == calls + 2 * 24  # the target's prompts alone are new
    kept = (found.by_category["object"].value, 1 - other.scores[PATCHED].ira.value)
    assert kept[0] == pytest.approx(kept[1])

    class Halves:
        name = "halves"

        def distances(self, first, second):
            return (first - second).flatten(1).abs().amax(1)

    (again,) = erosion(model, DrawnProbe(), steps[:1], 24, 0, without=["neon"], cache=cache, perceptual=Halves())
    assert again.perceptual.n == 72
    assert again.perceptual.value > 0
    assert replace(again, perceptual=None) == found
    assert again.as_dict()["perceptual"]["n"] == 72


def test_a_history_is_a_step_and_nothing_lost_is_no_erosion():
    model = TinyDrawn()
    names = [word.name for word in CATEGORIES["object"]]
    request = ForgetRequest((Concept("star", "object", "circle"),), preserve=tuple(names[1:4]), method="uce")
    history = History().forget(model, plan_request(request))
    (found,) = erosion(model, DrawnProbe(), [history], 12, 0, QUICK)
    assert found.forgotten == ("star",)
    assert (found.erosion.value, found.distance) == (0, 0)
    assert found.weights == weight_drift(model.survey, history.patch)
    assert found.weights.whole > 0


def test_what_cannot_be_measured_is_said(sequence):
    model, steps = sequence
    probe = DrawnProbe()
    for calls, error, words in (
        ({"steps": []}, RequestError, "at least one patch"),
        ({"count": 3}, RequestError, "at least 4"),
        ({"forgotten": [["star"]]}, RequestError, "2 steps but forgotten names for 1"),
        ({"without": ["dragon"]}, RequestError, "no concept 'dragon'"),
        (
            {"without": [w.name for ws in CATEGORIES.values() for w in ws]},
            RequestError,
            "retain set contains no object",
        ),
        ({"without": [w.name for w in CATEGORIES["identity"]]}, RequestError, "retain set contains no identity"),
        ({"steps": [random_patch(model.survey)]}, PatchError, "does not say which requests"),
        (
            {"steps": [random_patch(tiny_model(cross_attention_dim=48).survey, metadata=record("star"))]},
            PatchError,
            "architecture",
        ),
    ):
        given_ = {"steps": steps, "count": 12, "sampling": QUICK} | calls
        with pytest.raises(error, match=words):
            erosion(model, probe, **given_)
    assert not model.drawn.calls
    model.drawn.faults.append(lambda prompt, seed, labels: replace(labels, object=NONE, style=NONE, identity=NONE))
    with pytest.raises(ForgetConceptError, match="draws none"):
        erosion(model, probe, steps, 12, 0, QUICK)


def test_cancelled_it_leaves_the_model_as_it_was(sequence):
    model, steps = sequence
    before, seen = (state_hash(model.unet), flags(model.unet)), []

    def cancel(event):
        seen.append(event.step)
        if event.step > event.total // 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        erosion(model, DrawnProbe(), steps, 12, 0, QUICK, progress=cancel)
    assert seen == sorted(seen)
    assert (state_hash(model.unet), flags(model.unet)) == before
    assert not model.drawn.faults
