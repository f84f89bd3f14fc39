"""One call for one report: every part is what the single measurements say, on the embedded model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from tiny import fit, flags, random_patch, state_hash, tiny_model

from forget_concept.core.errors import PatchError, RequestError
from forget_concept.core.evaluation import PATCHED, UNEDITED, EvaluationTarget, SamplingSettings, evaluate
from forget_concept.core.evaluation import assess as assess_module
from forget_concept.core.evaluation.assess import EvaluationSettings, Evaluators, assess
from forget_concept.core.evaluation.attacks import BUDGETS
from forget_concept.core.evaluation.bench.concept_bench import PROMPT_KINDS, load_bench
from forget_concept.core.evaluation.report import report_dict, write_report
from forget_concept.core.evaluation.weight_drift import weight_drift
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.methods.sequence import History
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.training.textual_inversion import InversionSettings

SAMPLING = SamplingSettings(steps=2, precision="float32")
BRIEF = replace(
    BUDGETS["quick"], name="brief", pictures=2, strongest=1, examples=2, steps=1, rounds=1, candidates=2, rows=2
)
EVERYTHING = EvaluationSettings(
    4, 3, (UNEDITED,), SAMPLING, m_score=InversionSettings(tokens=2, steps=2), attacks=BRIEF
)
PLAIN = replace(EVERYTHING, quality=False, drift=False, attention=False, m_score=False, attacks=None)


@pytest.fixture(scope="module")
def patch(embedded):
    return fit(embedded[0], ForgetRequest((Concept("star", replacement="circle"),), ("moon",)))


def test_a_report_holds_every_measurement_and_the_model_comes_back(embedded, patch, tmp_path, monkeypatch):
    model, probe = embedded
    monkeypatch.setattr(assess_module, "concept_latents", partial(assess_module.concept_latents, count=2))
    before, flagged = state_hash(model.unet), flags(model.unet)
    text = state_hash(model.text.model)
    told = []
    report = assess(
        model,
        Evaluators.embedded(probe),
        [(patch, 1.0)],
        ["Star"],
        EVERYTHING,
        files=["s.safetensors"],
        progress=told.append,
    )
    assert state_hash(model.unet) == before and flags(model.unet) == flagged and state_hash(model.text.model) == text
    assert told and not report.left_out
    in_full = {"wordings", "strengths", "image_to_image"}
    assert set(report.not_measured) == {"by_kind", "erosion", *in_full}
    (alone,) = evaluate(
        model, probe, [EvaluationTarget("star", ((patch, 1.0),))], 4, 3, SAMPLING, baselines=(UNEDITED,)
    )
    assert report.evaluations[0].as_dict() == alone.as_dict()
    assert report.drift.values == weight_drift(model.survey, patch).sites
    assert {metric.name for metric in report.metrics} == {"FID", "KID", "Perceptual distance", "CLIP score"}
    for metric in report.metrics:
        assert metric.n == 8 and PATCHED in metric.values
        # one is of the pictures themselves, the others are distances from the unedited model's
        assert (UNEDITED in metric.values) == (metric.name == "CLIP score")
    assert {attack.name for attack in report.attacks} >= {"rephrased", "homoglyphs", "discrete", "soft_prompt"}
    assert all(attack.after.n == 2 and attack.concept == "star" for attack in report.attacks)
    assert [score.concept for score in report.m_scores] == ["star"]
    assert {pair.phrase for pair in report.attention} == {"star"} and len(report.attention) == 2
    facts = report.provenance.patches[0]
    assert (facts.file, facts.method, facts.concepts) == ("s.safetensors", "uce", ("star",))
    assert set(report.timings) == {"pictures", "picture quality", "attention", "M-Score", "attacks", "second judge"}
    path = write_report(report, tmp_path / "r.html")
    assert "star" in path.read_text(encoding="utf-8") and report_dict(report)["attacks"]


def test_several_concepts_and_strengths_share_the_kept_prompts(embedded, patch):
    model, probe = embedded
    report = assess(model, Evaluators.embedded(probe), [(patch, 0.5)], ["star", "neon", "star"], PLAIN)
    assert [one.concept for one in report.evaluations] == ["star", "neon"]
    assert report.measured == ("evaluations", "outcomes", "second_judge", "pictures")
    assert report.title == "Forgetting star, neon"
    assert all(grid.pairs[0].seed is not None for grid in report.pictures)


def test_a_benchmark_tells_the_kinds_of_prompts_apart(embedded, patch):
    model, probe = embedded
    report = assess(model, Evaluators.embedded(probe), [(patch, 1.0)], ["star"], PLAIN, bench=load_bench("embedded"))
    assert {one.kind for one in report.by_kind} == set(PROMPT_KINDS)
    assert report.provenance.measured["benchmark"] == load_bench("embedded").name
    assert sum(one.ua[PATCHED].n for one in report.by_kind) == report.evaluations[0].scores[PATCHED].ua.n


def test_earlier_steps_of_a_sequence_show_what_each_request_cost(embedded):
    model, probe = embedded
    first = History().forget(model, plan_request(ForgetRequest((Concept("star", replacement="circle"),), ("moon",))))
    second = first.forget(model, plan_request(ForgetRequest((Concept("neon", "style", "sketch"),), ("mosaic",))))
    report = assess(
        model, Evaluators.embedded(probe), [(second.patch, 1.0)], ["star", "neon"], PLAIN, earlier=[first.patch]
    )
    assert [(step.step, step.concept) for step in report.erosion] == [(1, "star"), (2, "neon")]
    assert all(0 <= step.kept.low <= step.kept.value <= step.kept.high for step in report.erosion)


def test_what_makes_no_sense_is_refused_before_anything_is_drawn(embedded, patch):
    model, probe = embedded
    evaluators = Evaluators.embedded(probe)

    def refused(words, patches=((patch, 1.0),), names=("star",), kind=RequestError, **more):
        told = []
        with pytest.raises(kind, match=words):
            assess(model, evaluators, list(patches), names, PLAIN, progress=told.append, **more)
        assert not told

    refused("name at least one", names=())
    refused("knows no concept 'unicorn'", names=("unicorn",))
    refused("no concept 'unicorn'", names=("unicorn",), bench=load_bench("embedded"))
    other = random_patch(tiny_model().survey)
    refused("another architecture", patches=[(other, 1.0)], kind=PatchError)
    with pytest.raises(RequestError, match="baseline 'luck'"):
        assess(model, evaluators, [(patch, 1.0)], ["star"], replace(PLAIN, baselines=("luck",)))


def test_another_judge_needs_a_benchmark_and_says_what_it_lacks(embedded, patch):
    model, probe = embedded
    world = Evaluators.embedded(probe).judge

    class Other:
        names, description, classify = world.names, "another judge", world.classify

    lacking = Evaluators(Other(), missing={"metrics": "no Inception here"})
    with pytest.raises(RequestError, match="give a benchmark"):
        assess(model, lacking, [(patch, 1.0)], ["star"], PLAIN)
    asked = replace(PLAIN, quality=True)
    report = assess(model, lacking, [(patch, 1.0)], ["star"], asked, bench=load_bench("embedded"))
    assert report.left_out == {"metrics": "no Inception here"} and not report.metrics
    assert report.provenance.measured["judge"] == "another judge"
    with pytest.raises(RequestError, match="leave the earlier patches out"):
        assess(model, lacking, [(patch, 1.0)], ["star"], PLAIN, bench=load_bench("embedded"), earlier=[patch])
