"""A name that keeps one sense and loses another: what is noised, what is steered where, and what cannot be meant."""

from __future__ import annotations

import pytest
import torch
from tiny import fit, flags, rand, state_hash

from forget_concept.core.errors import RequestError, TokenError
from forget_concept.core.methods.forget_me_not import ForgetMeNot
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.training.batches import RETAIN_POOL

QUICK = {"n_images": 2, "sample_steps": 1, "steps": 4, "batch_size": 4}
BAT = {"unwanted": ["a wooden bat", "baseball bat"], "wanted": ["flying bat"]}


def request(concept=None, preserve=(), preset="correction", seed=0, **settings):
    return ForgetRequest((concept or Concept("bat"),), preserve, "forget_me_not", preset, QUICK | settings, seed=seed)


@pytest.fixture()
def watched(monkeypatch):
    """Every batch a correction works on: (prompt, pool, prompt it is steered to, whether attention is turned away)."""
    found = {"rows": [], "objective": None}
    objective = ForgetMeNot.objective

    def kept(self, *args):
        made = found["objective"] = objective(self, *args)
        rows = made._rows
        made._rows = lambda step: found["rows"].extend(drawn := rows(step)) or drawn
        return made

    monkeypatch.setattr(ForgetMeNot, "objective", kept)
    return found


def test_pictures_of_both_senses_are_steered_to_the_one_that_stays(model, watched):
    asked = []
    sample = model.sample
    model.sample = lambda texts, *args, **kwargs: asked.extend(texts) or sample(texts, *args, **kwargs)
    before, flagged = state_hash(model.unet), flags(model.unet)
    told = []
    fit(model, request(preserve=("tree",), attention_weight=1.0, **BAT), told.append)
    assert state_hash(model.unet) == before and flags(model.unet) == flagged
    # the phrases stand in the name's place, article and all, and each has its pictures
    assert {"a photo of flying bat", "a photo of wooden bat", "a photo of baseball bat"} <= set(asked)
    rows, pools = watched["rows"], watched["objective"].batches.pools
    assert len(rows) == 16 and {len(pools[row.pool]) for row in rows} == {2}
    away = [row for row in rows if row.resteered]
    assert len(away) == 8 and {row.pool for row in away} == {"bat"}
    assert len({row.pool for row in rows if not row.resteered}) == 1
    for row in rows:
        assert row.steer_to == row.prompt.text.replace("bat", "flying bat")
    # what stays is kept under its own words too, the name itself is not
    kept = watched["objective"].batches.retain
    assert "a photo of a flying bat" in kept and "a photo of tree" in kept and RETAIN_POOL in pools
    assert not any(prompt.text in kept for prompt in watched["objective"].batches.targets)
    assert set(told[-1].terms) == {"attention", "steer", "show", "preserve"}


def test_an_even_share_is_drawn_of_everything_wanted(model, watched):
    fit(model, request(Concept("pilot"), wanted=("pilot", "pilot with long hair", "tall pilot"), steps=6, batch_size=2))
    rows = watched["rows"]
    assert [row.resteered for row in rows] == [False] * 12
    assert sorted(row.pool.partition(": ")[2] for row in rows) == sorted(
        ["pilot", "pilot with long hair", "tall pilot"] * 4
    )
    assert all(row.steer_to == row.prompt.text.replace("pilot", row.pool.partition(": ")[2]) for row in rows)


def test_the_names_prediction_goes_to_that_of_what_is_wanted(model):
    x, t = rand(4, 4, 8, 8), torch.tensor([100, 400, 600, 900])
    name, wanted = (model.text.encode([f"a photo of {w}"] * 4) for w in ("bat", "flying bat"))
    with torch.no_grad():
        to = model.predict_noise(x, t, wanted)
        far = float((model.predict_noise(x, t, name) - to).norm())
    patch = fit(model, request(steps=30, lr=1e-2, preserve_weight=0.0, templates=("a photo of {}",), **BAT))
    with torch.no_grad(), patch.applied(model.unet):
        assert float((model.predict_noise(x, t, name) - to).norm()) < 0.7 * far


@pytest.mark.parametrize(
    ("concept", "settings", "against"),
    [
        # away from the unwanted phrases by turns; without any away from the name, and from nothing where it is wanted
        ("bat", BAT, {"flying bat": {"wooden bat"}}),
        (
            "bat",
            BAT | {"wanted": ["flying bat", "small bat"]},
            {"flying bat": {"wooden bat"}, "small bat": {"baseball bat"}},
        ),
        ("pilot", {"wanted": ["pilot", "tall pilot"]}, {"pilot": {"pilot"}, "tall pilot": {"pilot"}}),
    ],
)
def test_a_contrast_steers_beyond_the_wanted_away_from_the_unwanted(model, watched, concept, settings, against):
    only = {"templates": ("a photo of {}",), "contrast": 1.5, "batch_size": 4, "steps": 1}
    fit(model, request(Concept(concept), **settings | only))
    rows, objective = watched["rows"], watched["objective"]
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row.steer_to.removeprefix("a photo of "), set()).add(
            row.steer_from.removeprefix("a photo of ")
        )
    assert found == against
    x, t = rand(4, 4, 8, 8), torch.tensor([100, 400, 600, 900])
    with torch.no_grad():
        to, off = (
            model.predict_noise(x, t, model.text.encode(texts))
            for texts in ([row.steer_to for row in rows], [row.steer_from for row in rows])
        )
    torch.testing.assert_close(objective._steering_target(x, t, rows), 2.5 * to - 1.5 * off, atol=1e-5, rtol=1e-4)


def test_published_is_the_attention_loss_on_pictures_of_the_unwanted(model, watched):
    told = []
    fit(model, request(preset="published", batch_size=2, unwanted=("wooden bat",)), told.append)
    assert set(told[-1].terms) == {"attention"}
    assert {(row.prompt.text, row.pool, row.steer_to) for row in watched["rows"]} == {("a photo of bat", "bat", None)}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (request(), "phrases in 'wanted'"),
        (request(unwanted=("wooden bat",)), "phrases in 'wanted'"),
        (request(Concept("bat", replacement="cat"), **BAT), "'bat' has a replacement"),
        (request(wanted=("flying bat",), attention_weight=1.0), "nothing to turn attention away from"),
        (request(**BAT, steer_weight=0.0, attention_weight=1.0), "'steer_weight' 0"),
        (request(**BAT, latents="zeros"), "need images"),
        (request(**BAT, latents="images"), "leave 'unwanted' out"),
        (request(unwanted=("a bat of wood",), wanted=("Bat of  Wood",)), "given twice"),
        (request(**BAT, contrast=-1.0), "'contrast' must be at least 0"),
        (request(contrast=1.0), "needs phrases in 'wanted'"),
        (request(wanted=(" ",)), "is empty"),
        (request(wanted="flying bat"), "'wanted' must be a list"),
    ],
)
def test_what_cannot_be_meant_is_refused(model, asked, words):
    with pytest.raises(RequestError, match=words):
        fit(model, asked)


def test_a_correction_is_about_one_name(model):
    both = ForgetRequest((Concept("bat"), Concept("bow")), (), "forget_me_not", "correction", QUICK | BAT)
    with pytest.raises(RequestError, match="for one name"):
        fit(model, both)


def test_phrases_that_are_cut_off_are_refused_before_any_work(model):
    told = []
    for name in ("wanted", "unwanted"):
        with pytest.raises(TokenError, match="cut off"):
            fit(model, request(**BAT | {name: ("x " * 80,)}), told.append)
    assert not told
