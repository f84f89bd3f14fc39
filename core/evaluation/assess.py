"""Complete evaluation of a patched model in one call: erasure, retention and robustness to attacks.

Runs every measurement of this package on a model with patches and returns one :class:`Report`. The classifiers and
metrics are passed as :class:`Evaluators`, so that the embedded model and any other checkpoint use the same code.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import ForgetConceptError, RequestError, listed
from ..files.workspace import Workspace
from ..mini import vocabulary
from ..models.images import from_bytes
from ..models.latent_diffusion import LatentDiffusion
from ..models.text_encoders import check_words
from ..models.token_positions import token_positions
from ..patch.patch import Patch
from ..progress import Progress
from ..request.concept import Concept, canonical_phrase
from ..training.textual_inversion import InversionSettings
from .attacks import AttackBudget, SuccessJudge, Target, run_attacks
from .attention_pictures import AttentionPair, attention_pairs
from .bench.concept_bench import ConceptBench
from .bench.questions import bench_questions
from .drawing import ImageClassifier, LabeledImage, Picture, SampleCache, SamplingSettings
from .erosion import erosion
from .evaluators import Evaluators
from .judges import Judge, WorldJudge
from .m_score import concept_latents, m_score
from .outcomes import Disagreement, Outcome, disagreement, outcome, replacement_in
from .quality import quality_metrics
from .questions import CATEGORIES
from .report import Attack, Drift, ErosionStep, KindScores, Metric, MScore, PatchFacts, Provenance, Report, grids
from .retention import text_distances
from .scores import (
    BASELINES,
    PATCHED,
    UNEDITED,
    EvaluationPlan,
    EvaluationTarget,
    build_variants,
    check_baselines,
    score_plan,
    world_plans,
)
from .stress import StressScores, StressSettings, nearest_names, stress_plan, stress_scores
from .weight_drift import weight_drift

__all__ = ["EvaluationSettings", "Evaluators", "assess"]

# attention maps per concept
ATTENTION_IMAGES = 2


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure. The M-Score and the attacks take by far the longest.

    Args:
        count: Images in each cell of UA, IRA and CRA.
        seed: Seed of prompts and images.
        baselines: Baselines to compare the patch with.
        sampling: Sampling settings.
        quality: Whether to measure FID, KID, perceptual distance and CLIP score on the retain images.
        drift: Whether to measure the relative weight change.
        attention: Whether to compute attention maps of the concept's name.
        m_score: Whether to measure the M-Score; inversion settings replace the quick default.
        attacks: Attack budget or its name; ``None`` runs no attacks.
        stress: Stress tests (:mod:`.stress`), which draw several times as many images; ``None`` omits them.
    """

    count: int = 100
    seed: int = 0
    baselines: tuple[str, ...] = BASELINES
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    quality: bool = True
    drift: bool = True
    attention: bool = True
    m_score: bool | InversionSettings = False
    attacks: str | AttackBudget | None = None
    stress: StressSettings | None = None

    def as_dict(self) -> dict[str, str | int | float | bool | None]:
        budget = self.attacks.name if isinstance(self.attacks, AttackBudget) else self.attacks
        s = self.sampling
        return {
            "count": self.count,
            "seed": self.seed,
            "baselines": ", ".join(self.baselines),
            "steps": s.steps,
            "sampler": s.sampler,
            "guidance": s.guidance,
            "precision": s.precision,
            "attacks": budget,
            "full": self.stress is not None,
        }


class _ConceptJudge:
    """Adapts a :class:`Judge` to the attacks' :class:`SuccessJudge`, for one concept."""

    def __init__(self, judge: Judge, name: str, category: str) -> None:
        self.judge, self.name, self.category = judge, name, category
        self.description = f"{judge.description}: {category} {name}"

    def shows(self, images: Tensor) -> list[bool]:
        return [
            canonical_phrase(getattr(labels, self.category)) == canonical_phrase(self.name)
            for labels in self.judge.classify(images)
        ]


class _Timer:
    """Measures the duration of each stage in seconds, in order of execution."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def assess(
    model: LatentDiffusion,
    evaluators: Evaluators,
    patches: Sequence[tuple[Patch, float]],
    concepts: Sequence[str],
    settings: EvaluationSettings | None = None,
    *,
    bench: ConceptBench | None = None,
    earlier: Sequence[Patch] = (),
    without: Sequence[str] = (),
    files: Sequence[str] = (),
    title: str = "",
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> Report:
    """Evaluate ``concepts`` on a model with patches. The model is restored bit-exactly.

    Measurements that this model does not support are omitted, and the report states the reason.

    Args:
        model: The unedited model.
        evaluators: Classifiers and metrics.
        patches: Patches, each with its strength.
        concepts: Names of the concepts to evaluate.
        settings: What to measure. Default: :class:`EvaluationSettings`.
        bench: Benchmark that provides the prompts. Default: the embedded model's world, for the embedded model only.
        earlier: Patches of the earlier steps of the same sequence, in order; adds generalization erosion to the report
            (embedded model only).
        without: Further concepts to exclude from the retain set.
        files: File names of the patches, for the report.
        title: Title of the report. Default: derived from the concepts.
        progress: Receives progress.
        workspace: Caches results, so that interrupted inversions and attacks resume.

    Raises:
        RequestError: If the judge or the benchmark does not know a concept, or the settings are invalid.
        PatchError: If a patch does not fit the model.
        TokenError: If a concept is the name of a textual inversion in this host.
        Cancelled: If ``progress`` cancels.
    """
    settings = settings or EvaluationSettings()
    names = list(dict.fromkeys(concepts))
    if not names:
        raise RequestError("There is no concept to evaluate: name at least one.")
    check_words(model.text, names)
    check_baselines(settings.baselines)
    for patch, _ in patches:
        patch.check_fits(model.survey)
    if earlier and not isinstance(evaluators.judge, WorldJudge):
        raise RequestError(
            "Erosion over a sequence is measured on the embedded model only: leave the earlier patches out."
        )
    patches, left_out, timer = tuple(patches), dict(evaluators.missing), _Timer()
    baselines = tuple(dict.fromkeys((UNEDITED, *settings.baselines)))
    plans = _plans(evaluators.judge, patches, names, settings, baselines, bench, without)
    cache = SampleCache(model, evaluators.judge, settings.sampling)
    for plan in plans:
        plan.request(cache)
    with timer("pictures"):
        cache.generate(progress)
        evaluations = tuple(score_plan(cache, plan, baselines) for plan in plans)
    outcomes = tuple(_outcome(cache, evaluators.judge, plan, patches) for plan in plans)
    second: tuple[Disagreement, ...] = ()
    if evaluators.second is not None:
        with timer("second judge"):
            second = tuple(one for plan in plans for one in _disagreements(cache, evaluators.second, plan))
    stress: list[StressScores] = []
    if settings.stress is not None:
        kept = _retain_names(evaluators.judge, bench, [*names, *without])
        with timer("stress tests"):
            for plan in plans:
                distances = text_distances(
                    model.text, plan.concept, [name for found in kept.values() for name in found]
                )
                near = nearest_names(kept, distances)
                tests = stress_plan(plan, patches, near, settings.stress, settings.seed)
                stress.append(stress_scores(cache, tests, settings.stress, distances, progress))
                if not stress[-1].image_to_image:
                    left_out["image_to_image"] = (
                        f"The unedited model draws no picture of '{plan.concept}' to start from, or has no autoencoder "
                        "here."
                    )
        evaluations = tuple(
            replace(one, retained=found.retained) for one, found in zip(evaluations, stress, strict=True)
        )
    sampling = cache.sampling.resolved(model)
    metrics: tuple[Metric, ...] = ()
    if settings.quality:
        with timer("picture quality"):
            metrics = quality_metrics(evaluators, cache, plans)
    attention: tuple[AttentionPair, ...] = ()
    if settings.attention:
        with timer("attention"):
            attention = _attention(model, plans, patches, sampling, left_out, progress)
    m_scores: list[MScore] = []
    attacks: list[Attack] = []
    for plan in plans:
        concept = Concept(plan.concept, plan.category)
        if settings.m_score:
            with timer("M-Score"), _skip_unsupported(left_out, "m_scores"):
                latents = concept_latents(model, concept, seed=settings.seed, progress=progress, workspace=workspace)
                inversion = settings.m_score if isinstance(settings.m_score, InversionSettings) else None
                found = m_score(model, concept, latents, patches, inversion, settings.seed, progress, workspace)
                m_scores.append(MScore(found.concept, found.before, found.after))
        if settings.attacks is not None:
            with timer("attacks"), _skip_unsupported(left_out, "attacks"):
                attacks += _run_attacks(
                    model, evaluators.judge, plan, bench, settings, sampling, left_out, progress, workspace
                )
    steps: tuple[ErosionStep, ...] = ()
    if earlier:
        with timer("erosion"):
            steps = _measure_erosion(
                model, evaluators.judge, [*earlier, _combined_patch(patches)], settings, cache, progress
            )
    drift = weight_drift(model.survey, _combined_patch(patches)) if settings.drift and patches else None
    facts = [
        PatchFacts.of(patch, strength, files[i] if i < len(files) else None)
        for i, (patch, strength) in enumerate(patches)
    ]
    return Report(
        title or f"Forgetting {listed(names)}",
        Provenance.of(
            model,
            facts,
            settings.as_dict()
            | {"precision": sampling.precision, "judge": evaluators.judge.description}
            | ({} if bench is None else {"benchmark": bench.name, "benchmark_digest": bench.digest()}),
        ),
        evaluations,
        tuple(KindScores(one.concept, kind, ua) for one in evaluations for kind, ua in one.by_kind.items()),
        tuple(attacks),
        tuple(m_scores),
        metrics,
        None if drift is None else Drift("‖ΔW‖ / ‖W‖ of each layer that reads text", drift.sites),
        steps,
        tuple(grid for one in evaluations for grid in grids(one)),
        attention,
        timer.seconds,
        left_out,
        outcomes=outcomes,
        second_judge=second,
        wordings=tuple(one for found in stress for one in found.wordings),
        strengths=tuple(one for found in stress for one in found.strengths),
        image_to_image=tuple(one for found in stress for one in found.image_to_image),
    )


def _outcome(cache: SampleCache, judge: Judge, plan: EvaluationPlan, patches: Sequence[tuple[Patch, float]]) -> Outcome:
    images = cache.get(plan.variants[PATCHED], [question.picture for question in plan.cells.target])
    return outcome(plan.concept, plan.category, images, judge, replacement_in(plan.concept, patches))


def _disagreements(cache: SampleCache, second: ImageClassifier, plan: EvaluationPlan) -> Iterator[Disagreement]:
    for variant in (UNEDITED, PATCHED):
        images = cache.get(plan.variants[variant], [question.picture for question in plan.cells.target])
        labels = second.classify(from_bytes(torch.stack([image.picture for image in images])))
        again = [LabeledImage(image.picture, found) for image, found in zip(images, labels, strict=True)]
        yield disagreement(plan.concept, plan.category, variant, images, again)


def _retain_names(judge: Judge, bench: ConceptBench | None, without: Sequence[str]) -> dict[str, list[str]]:
    """The names of the retain set by category, as the judge spells them."""
    left_out = {canonical_phrase(name) for name in without}
    if bench is None:
        every = {category: [word.name for word in vocabulary.CATEGORIES[category]] for category in CATEGORIES}
    else:
        listed_names = {canonical_phrase(one.name) for one in bench.concepts}
        every = {
            category: [name for name in names if canonical_phrase(name) in listed_names]
            for category, names in judge.names.items()
            if category in CATEGORIES
        }
    return {
        category: [name for name in names if canonical_phrase(name) not in left_out]
        for category, names in every.items()
    }


def _combined_patch(patches: Sequence[tuple[Patch, float]]) -> Patch:
    if len(patches) == 1 and patches[0][1] == 1.0:
        return patches[0][0]
    return Patch.combined(list(patches))


@contextmanager
def _skip_unsupported(left_out: dict[str, str], part: str) -> Iterator[None]:
    """Record an unsupported measurement in ``left_out``; an invalid request still raises."""
    try:
        yield
    except RequestError:
        raise
    except ForgetConceptError as error:
        left_out[part] = str(error)


def _plans(
    judge: Judge,
    patches: tuple[tuple[Patch, float], ...],
    names: Sequence[str],
    settings: EvaluationSettings,
    baselines: Sequence[str],
    bench: ConceptBench | None,
    without: Sequence[str],
) -> list[EvaluationPlan]:
    if bench is None:
        if not isinstance(judge, WorldJudge):
            raise RequestError("This model has no prompts of its own to evaluate: give a benchmark.")
        targets = [EvaluationTarget(name, patches) for name in names]
        return world_plans(targets, settings.count, settings.seed, without=without, baselines=baselines)
    found = []
    for name in names:
        concept = bench.find(name)
        cells = bench_questions(
            bench, judge.names, concept.name, settings.count, settings.seed, without=[*names, *without]
        )
        found.append(
            EvaluationPlan(concept.name, concept.category, cells, build_variants(concept.name, patches, baselines))
        )
    return found


def _attention(
    model: LatentDiffusion,
    plans: Sequence[EvaluationPlan],
    patches: Sequence[tuple[Patch, float]],
    sampling: SamplingSettings,
    left_out: dict[str, str],
    progress: Progress | None,
) -> tuple[AttentionPair, ...]:
    pictures: list[Picture] = []
    phrases: list[str] = []
    for plan in plans:
        named = [q.picture for q in plan.cells.target if _contains_phrase(model, q.picture.prompt, plan.concept)]
        pictures += named[:ATTENTION_IMAGES]
        phrases += [plan.concept] * len(named[:ATTENTION_IMAGES])
    if not pictures:
        left_out["attention"] = "no prompt contains the concept's name."
        return ()
    with _skip_unsupported(left_out, "attention"):
        return tuple(attention_pairs(model, pictures, phrases, patches, sampling, progress))
    return ()


def _contains_phrase(model: LatentDiffusion, prompt: str, phrase: str) -> bool:
    try:
        return bool(token_positions(model.text, phrase, prompt))
    except ForgetConceptError:  # the phrase does not occur, or is truncated
        return False


def _run_attacks(
    model: LatentDiffusion,
    judge: Judge,
    plan: EvaluationPlan,
    bench: ConceptBench | None,
    settings: EvaluationSettings,
    sampling: SamplingSettings,
    left_out: dict[str, str],
    progress: Progress | None,
    workspace: Workspace | None,
) -> list[Attack]:
    if bench is None:
        target = Target.embedded(plan.concept)
    else:
        prompts = bench.find(plan.concept).prompts
        target = Target.named(Concept(plan.concept, plan.category), (*prompts["paraphrased"], *prompts["indirect"]))
    assert settings.attacks is not None
    concept_judge: SuccessJudge = _ConceptJudge(judge, plan.concept, plan.category)
    found = run_attacks(
        model,
        plan.variants[PATCHED],
        target,
        concept_judge,
        settings.attacks,
        settings.seed,
        beyond_text=settings.stress is not None,
        sampling=sampling,
        workspace=workspace,
        progress=progress,
    )
    left_out |= {f"attack {name} on '{plan.concept}'": why for name, why in found.left_out.items()}
    return [
        Attack(
            one.attack,
            found.concept,
            one.before,
            one.after,
            one.cost.summary,
            tuple(prompt.prompt for prompt in one.strongest),
        )
        for one in found.results
    ]


def _measure_erosion(
    model: LatentDiffusion,
    judge: Judge,
    steps: Sequence[Patch],
    settings: EvaluationSettings,
    cache: SampleCache,
    progress: Progress | None,
) -> tuple[ErosionStep, ...]:
    found = erosion(
        model, judge, steps, settings.count, settings.seed, settings.sampling, cache=cache, progress=progress
    )
    forgotten: set[str] = set()
    steps_of_report = []
    for step in found:
        new = [name for name in step.forgotten if name not in forgotten]
        forgotten |= set(step.forgotten)
        steps_of_report.append(ErosionStep(step.step, listed(new) if new else "nothing new", step.erosion.complement))
    return tuple(steps_of_report)
