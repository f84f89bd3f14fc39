"""Stress tests against a model whose pictures are known: each figure is the one that was put in."""

from __future__ import annotations

import pytest
import torch
from drawn import DrawnModel, DrawnPatch, DrawnProbe, forgets
from tiny import fit, state_hash

from forget_concept.core.errors import RequestError
from forget_concept.core.evaluation import PATCHED, UNEDITED, EvaluationTarget, SampleCache, SamplingSettings, Variant
from forget_concept.core.evaluation.assess import EvaluationSettings, Evaluators, assess
from forget_concept.core.evaluation.judges import WorldJudge
from forget_concept.core.evaluation.outcomes import disagreement, outcome
from forget_concept.core.evaluation.retention import Retained, lowest, retained_scores, text_distances
from forget_concept.core.evaluation.scores import world_plans
from forget_concept.core.evaluation.stress import (
    StressSettings,
    image_to_image,
    nearest_names,
    strength_scores,
    stress_plan,
    wording_scores,
)
from forget_concept.core.evaluation.wordings import WORDINGS, wording_questions
from forget_concept.core.mini.vocabulary import CATEGORIES, NONE
from forget_concept.core.mini.world import Labels
from forget_concept.core.models.sampling_start import Start
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

SAMPLING = SamplingSettings(steps=2, precision="float32")
SMALL = StressSettings(target=4, kept=1, continued=3)


def stressed(fault, settings=SMALL, count=8):
    """The plan and the cache with every image of a patch that changes labels."""
    patch = DrawnPatch(fault)
    (plan,) = world_plans([EvaluationTarget("star", ((patch, 1.0),))], count, baselines=(UNEDITED,))
    names = {category: [w.name for w in found if w.name != "star"] for category, found in CATEGORIES.items()}
    stress = stress_plan(plan, ((patch, 1.0),), names, settings)
    cache = SampleCache(DrawnModel(), DrawnProbe(), SAMPLING)
    plan.request(cache)
    stress.request(cache)
    cache.generate()
    return stress, cache


def test_the_wording_that_brings_it_back_is_the_one_that_says_so():
    def fault(prompt, seed, labels):
        gone = labels.object == "star" and "neighbour's" not in prompt
        return Labels(NONE, labels.style, labels.identity, labels.colour) if gone else labels

    stress, cache = stressed(fault)
    found, retained = wording_scores(cache, stress)
    assert [one.wording for one in found] == list(WORDINGS)
    by = {one.wording: one for one in found}
    # half of the possessives are of that template
    assert by["possessive"].forgotten.value == 0.5 and by["possessive"].shown.value == 1
    assert by["question"].forgotten.value == 1
    # the stand-in reads no misspelled name, so that wording says nothing
    assert by["typo"].shown.value == 0 and by["typo"].forgotten is None and by["typo"].kept is None
    assert all(one.kept.value == 1 for one in found if one.kept is not None)
    assert {one.name for one in retained} == {w.name for f in CATEGORIES.values() for w in f} - {"star"}


def test_the_concept_that_suffers_is_named_with_its_wording():
    def fault(prompt, seed, labels):
        damaged = labels.object == "mushroom" and prompt.endswith("?")
        return Labels("moon", labels.style, labels.identity, labels.colour) if damaged else labels

    stress, cache = stressed(fault, StressSettings(target=2, kept=4))
    _, retained = wording_scores(cache, stress)
    least = lowest(retained)
    assert least.name == "mushroom" and least.wording == "question" and least.n == 4 * len(WORDINGS)
    # questions are one of seven wordings that the stand-in follows
    assert least.kept.value == pytest.approx(6 / 7, abs=0.05)


def test_too_few_pictures_name_no_lowest():
    few = Retained("moon", "object", None, 40), Retained("key", "object", None, 23)
    assert lowest(few) is None
    image = [type("Image", (), {"labels": Labels(object=name)})() for name in ("moon", "moon", "key")]
    stress, _ = stressed(lambda prompt, seed, labels: labels)
    questions = [q for q in stress.kept if q.expected == "moon"][:3]
    (one,) = retained_scores(questions, image[:2] + image[:1], image)
    assert one.kept.value == pytest.approx(2 / 3) and one.n == 3 and lowest([one]) is None
    assert lowest([one], enough=3) is one


def test_strengths_count_each_variant():
    stress, cache = stressed(forgets("star", "object").fault)
    found = strength_scores(cache, stress)
    assert [one.strength for one in found] == [0.5, 0.7, 1.0]
    assert all(one.ua.value == 1 and one.ira.value == 1 and one.ua.n == 8 for one in found)


def test_what_is_drawn_in_its_place():
    judge = WorldJudge(DrawnProbe())
    seen = ["star", "circle", "circle", "moon", NONE, NONE]
    images = [type("Image", (), {"labels": Labels(object=name)})() for name in seen]
    images.append(type("Image", (), {"labels": Labels(identity="Ivy Stone")})())
    found = outcome("star", "object", images, judge, "a Circle")
    assert [round(7 * score.value) for score in (found.shown, found.replacement, found.nothing, found.other)] == [
        *(1, 2, 2, 2)
    ]
    assert dict(found.others) == {"moon": 1, "Ivy Stone": 1} and found.name == "circle"
    unknown = outcome("star", "object", images, judge, "a rocket")
    assert unknown.replacement is None and unknown.name is None and round(7 * unknown.other.value) == 4
    again = [type("Image", (), {"labels": Labels(object=name)})() for name in ("star", "circle", "star", "moon")]
    differ = disagreement("star", "object", PATCHED, images[:4], again)
    assert differ.differ.value == 0.25 and differ.ua.value == 0.5


def test_many_names_are_those_near_and_some_of_every_distance():
    names = {"object": [f"thing {i}" for i in range(200)]}
    distances = {f"thing {i}": i / 200 for i in range(200)}
    found = nearest_names(names, distances)["object"]
    assert len(found) == 40 and found[:20] == names["object"][:20] and max(distances[n] for n in found) > 0.9
    assert nearest_names({"object": ["a", "b"]}, {"a": 0.1, "b": 0.2}) == {"object": ["a", "b"]}


# -- on the embedded model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patch(embedded):
    return fit(embedded[0], ForgetRequest((Concept("star", replacement="circle"),), ("moon",)))


def test_a_picture_that_is_continued_starts_from_its_latents(embedded):
    model, _ = embedded
    start = model.sample(["a red star"], [3], steps=4, guidance=1.0)
    whole = model.sample(["a red star"], [3], steps=4, guidance=1.0, start=Start(start, 4))
    level = model.noise_levels(model.timesteps(4, model.spacing), 4, model.spacing, 0.0)[4]
    noise = model.initial_noise([3])
    assert torch.allclose(whole, level[0] * start + level[1] * noise, atol=1e-6)
    most = model.sample(["a red star"], [3], steps=4, guidance=1.0, start=Start(start, 3))
    least = model.sample(["a blue moon"], [3], steps=4, guidance=1.0, start=Start(start, 1))
    assert (most - start).square().mean() < (least - start).square().mean()
    wrongs = ({"start": Start(start, 5)}, {"start": Start(start, -1)}, {"start": Start(start, 3), "until": 2})
    for wrong in (*wrongs, {"start": Start(start[:, :2])}):
        with pytest.raises(RequestError):
            model.sample(["a red star"], [3], steps=4, **wrong)


def test_names_of_one_category_are_nearer_than_those_of_another(embedded):
    found = text_distances(embedded[0].text, "Ivy Stone", ["Mira Vale", "Ivy Stone", "mosaic"])
    assert found["Ivy Stone"] == pytest.approx(0, abs=1e-5)
    assert 0 < found["Mira Vale"] < found["mosaic"]


def test_a_full_report_has_every_part_and_the_model_comes_back(embedded, patch):
    model, probe = embedded
    before = state_hash(model.unet)
    settings = EvaluationSettings(
        4, 0, (UNEDITED,), SAMPLING, False, False, False, stress=StressSettings(1, 1, (0.5,), 2)
    )
    judges = Evaluators(WorldJudge(probe), second=probe)
    report = assess(model, judges, [(patch, 1.0)], ["star"], settings)
    assert state_hash(model.unet) == before
    assert len(report.wordings) == len(WORDINGS) and len(report.strengths) == 2
    assert {one.prompt for one in report.image_to_image} <= {"named", "empty"}
    assert report.image_to_image or "image_to_image" in report.left_out
    assert report.outcomes[0].name == "circle"
    # the same classifier twice
    assert [one.differ.value for one in report.second_judge] == [0, 0]
    (one,) = report.evaluations
    assert {kept.name for kept in one.retained} == {w.name for f in CATEGORIES.values() for w in f} - {"star"}
    assert all(kept.distance is not None and kept.n == len(WORDINGS) for kept in one.retained)
    brief = assess(
        model, judges, [(patch, 1.0)], ["star"], EvaluationSettings(4, 0, (UNEDITED,), SAMPLING, False, False, False)
    )
    assert not brief.wordings and not brief.strengths and brief.outcomes and brief.evaluations[0].retained


@pytest.mark.long
@pytest.mark.parametrize(("replacement", "strength"), [(None, 1.0), ("Mira Vale", 0.7)])
def test_a_person_is_gone_in_wordings_that_no_fit_uses(embedded, replacement, strength):
    """Without a replacement, and at an ordinary strength of a LoRA: both let a person through before."""
    model, probe = embedded
    found = fit(model, ForgetRequest((Concept("Ivy Stone", "identity", replacement),)))
    names = {category: [w.name for w in words if w.name != "Ivy Stone"] for category, words in CATEGORIES.items()}
    asked = wording_questions("Ivy Stone", "identity", 12, 0, names)
    cache = SampleCache(model, probe, SamplingSettings(precision="float32"))
    variants = Variant(), Variant(((found, strength),))
    for variant in variants:
        cache.request(variant, [question.picture for question in asked])
    cache.generate()
    before, after = (
        sum(q.is_correct(one) for q, one in zip(asked, cache.get(v, [q.picture for q in asked]), strict=True))
        for v in variants
    )
    assert before > 60
    assert after <= 5


@pytest.mark.long
def test_a_patch_cannot_stop_a_picture_that_is_half_there(embedded, patch):
    """Known limit: what a picture itself shows, no edit of the text's path takes away."""
    model, probe = embedded
    variant = EvaluationTarget("star", ((patch, 1.0),))
    (plan,) = world_plans([variant], 24, baselines=(UNEDITED,))
    cache = SampleCache(model, probe, SamplingSettings(precision="float32"))
    plan.request(cache)
    cache.generate()
    named, empty = image_to_image(cache, stress_plan(plan, ((patch, 1.0),), {}, StressSettings(continued=12)))
    assert named.before.value > 0.8 and empty.before.value > 0.8
    assert empty.after.value > 0.5
