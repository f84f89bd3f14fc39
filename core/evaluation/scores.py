"""Unlearning accuracy (UA) and in-domain and cross-domain retain accuracy (IRA, CRA) on classified samples.

The metrics are those of UnlearnCanvas (arXiv 2402.11846). Every image has a fixed seed that is the same for each
variant of the model, so that variants are compared image by image. A patch is compared with baselines: the unedited
model, the concept as a negative prompt, and Safe Latent Diffusion's guidance away from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import RequestError
from ..models.latent_diffusion import LatentDiffusion
from ..models.safe_guidance import SafetyGuidance
from ..patch.patch import Patch
from ..progress import Progress
from .drawing import ImageClassifier, LabeledImage, SampleCache, SamplingSettings, Variant
from .intervals import Score
from .questions import CATEGORIES, Question, find_concept, retain_questions, target_questions
from .retention import Retained, retained_scores

__all__ = [
    "NEGATIVE",
    "PATCHED",
    "SAFE",
    "UNEDITED",
    "Evaluation",
    "EvaluationPlan",
    "EvaluationTarget",
    "Example",
    "QuestionSets",
    "Scores",
    "build_variants",
    "check_baselines",
    "evaluate",
    "image_distance",
    "image_drift",
    "score_plan",
    "score_variant",
    "world_plans",
]

PATCHED, UNEDITED, NEGATIVE, SAFE = "patched", "unedited", "negative_prompt", "safe_guidance"
BASELINES = (UNEDITED, NEGATIVE, SAFE)
MIN_COUNT, EXAMPLES = 4, 3


@dataclass(frozen=True)
class EvaluationTarget:
    """A concept to evaluate and the patches, each with its strength, that are meant to remove it."""

    concept: str
    patches: tuple[tuple[Patch, float], ...]


@dataclass(frozen=True)
class Scores:
    """Scores of one variant of the model, each a fraction with its interval and ``n``.

    The retain accuracies are relative to the unedited model on the same prompts and seeds.

    Attributes:
        ua: Fraction of the target's prompts whose images the classifier does not label with the target.
        ira: Retain accuracy on prompts without the target, for concepts of the target's category.
        cra: Retain accuracy on prompts without the target, for concepts of the other categories.
        cra_target: Retain accuracy for everything else that the target's own prompts name (object, style, identity,
            colour); each attribute is one trial.

    Reference: UnlearnCanvas, arXiv 2402.11846.
    """

    ua: Score
    ira: Score
    cra: Score
    cra_target: Score

    def as_dict(self) -> dict[str, dict[str, float | int]]:
        return {name: getattr(self, name).as_dict() for name in ("ua", "ira", "cra", "cra_target")}


@dataclass(frozen=True)
class Example:
    """Two images ``(3, H, W)``, uint8, of the same prompt and seed, without and with the patch."""

    prompt: str
    seed: int
    before: LabeledImage
    after: LabeledImage


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of one concept.

    Attributes:
        concept: Name of the concept.
        category: Its category.
        n_target: Number of prompts that name it.
        n_kept: Number of prompts about the retain set.
        scores: :class:`Scores` by variant.
        accuracy: The unedited model's absolute accuracy behind ``ira``, ``cra`` and ``cra_target``.
        target_examples: A few images of prompts that name the concept.
        kept_examples: A few images of prompts about the retain set.
        drift: By variant, the root-mean-square pixel difference in [0, 1] from the unedited model's images of the same
            prompts and seeds; mean over the ``n_kept`` retain prompts. It detects images that change but keep their
            labels.
        by_kind: UA by kind of prompt and variant, for benchmarks with several kinds.
        neighbours: The part of ``ira`` about the concept's neighbours, by variant, if the benchmark names some and the
            unedited model draws any of them correctly.
        retained: Every concept of the retain set by itself, with the patch.
    """

    concept: str
    category: str
    n_target: int
    n_kept: int
    scores: Mapping[str, Scores]
    accuracy: Mapping[str, Score]
    target_examples: tuple[Example, ...] = ()
    kept_examples: tuple[Example, ...] = ()
    drift: Mapping[str, float] = field(default_factory=dict)
    by_kind: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    neighbours: Mapping[str, Score] = field(default_factory=dict)
    retained: tuple[Retained, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return {
            "concept": self.concept,
            "category": self.category,
            "n_target": self.n_target,
            "n_kept": self.n_kept,
            "scores": {name: scores.as_dict() for name, scores in self.scores.items()},
            "unedited_accuracy": {name: score.as_dict() for name, score in self.accuracy.items()},
            "drift": dict(self.drift),
            "retained": [one.as_dict() for one in self.retained],
        }


@dataclass(frozen=True)
class QuestionSets:
    """The questions for one concept.

    Attributes:
        target: Questions about the concept itself.
        in_domain: Questions about the retain set of its own category.
        cross_domain: Questions about the retain set of the other categories.
        neighbours: Names in ``in_domain`` that the benchmark lists as neighbours of the concept.
    """

    target: list[Question]
    in_domain: list[Question]
    cross_domain: list[Question]
    neighbours: tuple[str, ...] = ()

    @property
    def all(self) -> list[Question]:
        """All questions."""
        return [*self.target, *self.in_domain, *self.cross_domain]


@dataclass(frozen=True)
class EvaluationPlan:
    """The questions and the model variants to evaluate for one concept; :data:`UNEDITED` is always a variant."""

    concept: str
    category: str
    cells: QuestionSets
    variants: Mapping[str, Variant]

    def request(self, cache: SampleCache) -> None:
        """Register all images of the plan in the cache."""
        for variant in self.variants.values():
            cache.request(variant, [question.picture for question in self.cells.all])


def check_baselines(baselines: Sequence[str]) -> None:
    """Raise :class:`RequestError` for a name that is not in :data:`BASELINES`."""
    if unknown := [name for name in baselines if name not in BASELINES]:
        raise RequestError(f"The baseline '{unknown[0]}' is not known: choose from {', '.join(BASELINES)}.")


def build_variants(
    name: str, patches: tuple[tuple[Patch, float], ...], baselines: Sequence[str] = BASELINES
) -> dict[str, Variant]:
    """Return the model variants to compare for a concept, by name; the unedited model is always included."""
    variants = {PATCHED: Variant(patches), UNEDITED: Variant()}
    if NEGATIVE in baselines:
        variants[NEGATIVE] = Variant(negative=name)
    if SAFE in baselines:
        variants[SAFE] = Variant(safe=SafetyGuidance(name))
    return variants


def world_plans(
    targets: Sequence[EvaluationTarget],
    count: int,
    seed: int = 0,
    *,
    without: Sequence[str] = (),
    baselines: Sequence[str] = (UNEDITED, NEGATIVE),
) -> list[EvaluationPlan]:
    """Return the plan of each target on the embedded model's world; see :func:`evaluate` for the arguments."""
    if count < MIN_COUNT:
        raise RequestError(f"{count} images per cell are too few to measure: use at least {MIN_COUNT}.")
    if not targets:
        raise RequestError("There is no concept to evaluate: name at least one.")
    check_baselines(baselines)
    named = [find_concept(target.concept) for target in targets]
    excluded = tuple(dict.fromkeys([name for name, _ in named] + [find_concept(name)[0] for name in without]))
    pools = {category: retain_questions(category, count, seed, excluded) for category in CATEGORIES}
    plans = []
    for target, (name, category) in zip(targets, named, strict=True):
        first, second = (c for c in CATEGORIES if c != category)
        other = [*pools[first][: count - count // 2], *pools[second][: count // 2]]
        cells = QuestionSets(target_questions(name, count, seed), pools[category], other)
        plans.append(EvaluationPlan(name, category, cells, build_variants(name, target.patches, baselines)))
    return plans


def evaluate(
    model: LatentDiffusion,
    probe: ImageClassifier,
    targets: Sequence[EvaluationTarget],
    count: int = 200,
    seed: int = 0,
    sampling: SamplingSettings | None = None,
    *,
    without: Sequence[str] = (),
    baselines: Sequence[str] = (UNEDITED, NEGATIVE),
    progress: Progress | None = None,
    cache: SampleCache | None = None,
) -> list[Evaluation]:
    """Evaluate every target on the embedded model's world: UA, IRA and CRA of each model variant.

    The retain prompts name none of the targets and nothing in ``without``, so that all targets share them and the
    unedited model samples them once.

    Args:
        model: The embedded model.
        probe: Classifies the images.
        targets: Concepts and their patches.
        count: Images in each of the three cells (target, in-domain, cross-domain).
        seed: Seed of the prompts and images.
        sampling: Sampling settings. Default: :class:`SamplingSettings`.
        without: Further concepts to exclude from the retain set.
        baselines: Any of :data:`UNEDITED`, :data:`NEGATIVE` and :data:`SAFE` (the published medium configuration, with
            three UNet passes per step instead of two).
        progress: Receives sampling progress.
        cache: Shares images with other measurements; its model, probe and sampling settings take precedence.

    Returns:
        One :class:`Evaluation` per target.

    Raises:
        RequestError: If the probe does not know a concept, there are too few images, or a baseline is unknown.
        ForgetConceptError: If the unedited model draws nothing of a cell correctly.

    Reference: UnlearnCanvas, arXiv 2402.11846.
    """
    plans = world_plans(targets, count, seed, without=without, baselines=baselines)
    cache = cache or SampleCache(model, probe, sampling or SamplingSettings())
    for plan in plans:
        plan.request(cache)
    cache.generate(progress)
    return [score_plan(cache, plan, baselines) for plan in plans]


def _correct(questions: Sequence[Question], images: Sequence[LabeledImage]) -> list[bool]:
    return [question.is_correct(image) for question, image in zip(questions, images, strict=True)]


def _correct_others(questions: Sequence[Question], images: Sequence[LabeledImage]) -> list[bool]:
    """One outcome per attribute that a prompt names besides the checked one."""
    return [
        getattr(image.labels, attribute) == getattr(question.prompt.expected, attribute)
        for question, image in zip(questions, images, strict=True)
        for attribute in question.other_attributes()
    ]


def image_distance(before: Sequence[LabeledImage], after: Sequence[LabeledImage]) -> float:
    """Return the root-mean-square pixel difference, in [0, 1], of paired images; mean over the pairs."""
    distances = [
        float((b.picture.float() - a.picture.float()).square().mean().sqrt()) / 255
        for b, a in zip(before, after, strict=True)
    ]
    return sum(distances) / len(distances)


def score_variant(cache: SampleCache, plan: EvaluationPlan, variant: str) -> dict[str, Score | None]:
    """Score one variant of the model on the cached images of a plan.

    Returns:
        The four :class:`Scores` fields, ``neighbours``, and ``ua_<kind>`` for each kind of target prompt. A value is
        ``None`` if there are no such questions or the unedited model draws none of them correctly.
    """
    cells = plan.cells

    def outcomes(name: str) -> dict[str, list[bool]]:
        def images(questions: Sequence[Question]) -> list[LabeledImage]:
            return cache.get(plan.variants[name], [question.picture for question in questions])

        same = _correct(cells.in_domain, images(cells.in_domain))
        return {
            "ua": [not found for found in _correct(cells.target, images(cells.target))],
            "ira": same,
            "cra": _correct(cells.cross_domain, images(cells.cross_domain)),
            "cra_target": _correct_others(cells.target, images(cells.target)),
            "neighbours": [
                right for right, q in zip(same, cells.in_domain, strict=True) if q.expected in cells.neighbours
            ],
        }

    base, got = outcomes(UNEDITED), outcomes(variant)
    found: dict[str, Score | None] = {"ua": Score.share(got["ua"])}
    for part in ("ira", "cra", "cra_target", "neighbours"):
        found[part] = Score.ratio(got[part], base[part]) if any(base[part]) else None
    for kind in dict.fromkeys(question.kind for question in cells.target if question.kind):
        gone = [one for one, question in zip(got["ua"], cells.target, strict=True) if question.kind == kind]
        found[f"ua_{kind}"] = Score.share(gone)
    return found


def image_drift(cache: SampleCache, plan: EvaluationPlan, variant: str) -> float:
    """Return the image drift of one variant on the retain prompts; see :attr:`Evaluation.drift`."""
    pictures = [question.picture for question in (*plan.cells.in_domain, *plan.cells.cross_domain)]
    before, after = (cache.get(plan.variants[name], pictures) for name in (UNEDITED, variant))
    return image_distance(before, after)


def score_plan(cache: SampleCache, plan: EvaluationPlan, baselines: Sequence[str] = BASELINES) -> Evaluation:
    """Score a plan whose images are in the cache.

    Args:
        cache: Cache that holds all images of the plan.
        plan: The plan.
        baselines: :data:`UNEDITED` appears among the scores only if it is listed here.

    Raises:
        ForgetConceptError: If the unedited model draws nothing of a cell correctly, so that retention is undefined.
    """
    cells, variants = plan.cells, plan.variants

    def images(variant: str, questions: Sequence[Question]) -> list[LabeledImage]:
        return cache.get(variants[variant], [question.picture for question in questions])

    base = {
        "ira": _correct(cells.in_domain, images(UNEDITED, cells.in_domain)),
        "cra": _correct(cells.cross_domain, images(UNEDITED, cells.cross_domain)),
        "cra_target": _correct_others(cells.target, images(UNEDITED, cells.target)),
    }
    scores, drift, neighbours = {}, {}, {}
    by_kind: dict[str, dict[str, Score]] = {}
    for variant in variants:
        if variant == UNEDITED and UNEDITED not in baselines:
            continue
        found = score_variant(cache, plan, variant)
        near = found.pop("neighbours")
        for part, answers in base.items():
            if found[part] is None:
                Score.ratio(answers, answers)  # raises ForgetConceptError
        known = {part: score for part, score in found.items() if score is not None}
        scores[variant] = Scores(*(known[part] for part in ("ua", "ira", "cra", "cra_target")))
        for part, score in known.items():
            if part.startswith("ua_"):
                by_kind.setdefault(part[3:], {})[variant] = score
        if near is not None:
            neighbours[variant] = near
        drift[variant] = image_drift(cache, plan, variant)

    def examples(questions: Sequence[Question]) -> tuple[Example, ...]:
        before, after = images(UNEDITED, questions), images(PATCHED, questions)
        return tuple(Example(q.prompt.text, q.seed, b, a) for q, b, a in zip(questions, before, after, strict=True))

    # the kinds of a benchmark's prompts are no wordings
    kept = [replace(question, kind="") for question in (*cells.in_domain, *cells.cross_domain)]
    # one example of each category; concepts that share their prompts get different examples
    at = CATEGORIES.index(plan.category)
    shown = [
        cells.in_domain[at],
        cells.cross_domain[at % (len(cells.cross_domain) // 2)],
        cells.cross_domain[-1 - at % (len(cells.cross_domain) // 2)],
    ]
    return Evaluation(
        plan.concept,
        plan.category,
        len(cells.target),
        len(cells.in_domain) + len(cells.cross_domain),
        scores,
        {part: Score.share(base[part]) for part in ("ira", "cra", "cra_target")},
        examples(cells.target[:EXAMPLES]),
        examples(shown),
        drift,
        by_kind,
        neighbours,
        retained_scores(kept, images(UNEDITED, kept), images(PATCHED, kept)),
    )
