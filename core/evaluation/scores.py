"""What was forgotten and what was kept: UA, IRA, CRA, measured by asking a probe about drawn pictures.

The words are UnlearnCanvas' (arXiv 2402.11846): unlearning accuracy, in-domain and cross-domain retain accuracy. Every
picture has its own fixed seed, the same for each variant of the model, so that two variants are compared picture by
picture. Baselines stand beside a patch: the unedited model, the concept as a negative prompt, and Safe Latent
Diffusion's guidance away from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import RequestError
from ..mini import vocabulary, world
from ..models.latent_diffusion import LatentDiffusion
from ..models.safe_guidance import SafetyGuidance
from ..patch.patch import Patch
from ..progress import Progress
from ..request.concept import normalized_phrase
from .drawing import ImageClassifier, LabeledImage, Picture, SampleCache, SamplingSettings, Variant
from .intervals import Score

__all__ = [
    "NEGATIVE",
    "PATCHED",
    "SAFE",
    "UNEDITED",
    "Evaluation",
    "EvaluationPlan",
    "EvaluationTarget",
    "Example",
    "Question",
    "QuestionSets",
    "Scores",
    "build_variants",
    "check_baselines",
    "evaluate",
    "find_concept",
    "image_distance",
    "image_drift",
    "retain_questions",
    "score_plan",
    "score_variant",
    "seed_of",
    "target_questions",
    "world_plans",
]

CATEGORIES = ("object", "style", "identity")
ATTRIBUTES = (*CATEGORIES, "colour")
PATCHED, UNEDITED, NEGATIVE, SAFE = "patched", "unedited", "negative_prompt", "safe_guidance"
BASELINES = (UNEDITED, NEGATIVE, SAFE)
MIN_COUNT, EXAMPLES = 4, 3


def find_concept(name: str) -> tuple[str, str]:
    """The name as the embedded model's world writes it, and its category.

    Raises :class:`RequestError` for a concept the probe cannot see, listing those it can.
    """
    for category, words in vocabulary.CATEGORIES.items():
        for word in words:
            if normalized_phrase(word.name) == normalized_phrase(name):
                return word.name, category
    known = "; ".join(f"{c}: {', '.join(w.name for w in words)}" for c, words in vocabulary.CATEGORIES.items())
    raise RequestError(f"The probe knows no concept '{name}', so it cannot be measured; it knows {known}.")


@dataclass(frozen=True)
class Question:
    """A picture and the attribute that is asked about: does the judge find what the prompt says of ``category``?

    ``kind`` is that of the prompt, where a benchmark has several.
    """

    prompt: world.Prompt
    seed: int
    category: str
    kind: str = ""

    @property
    def picture(self) -> Picture:
        return Picture(self.prompt.text, self.seed)

    @property
    def expected(self) -> str:
        return str(getattr(self.prompt.expected, self.category))

    def is_correct(self, seen: LabeledImage) -> bool:
        """Whether the probe finds what was prompted."""
        return bool(getattr(seen.labels, self.category) == self.expected)

    def other_attributes(self) -> list[str]:
        """The other attributes that the prompt names."""
        return [a for a in ATTRIBUTES if a != self.category and getattr(self.prompt.expected, a) != vocabulary.NONE]


def seed_of(*parts: object) -> int:
    """A seed for what these parts name, the same in every run and on every machine."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little") // 2


def _prompts(category: str, name: str, count: int, seed: int, without: tuple[str, ...] = ()) -> list[world.Prompt]:
    about = {"object": None, "style": None, "identity": None, category: name}
    return world.prompts(
        count, seed, object=about["object"], style=about["style"], identity=about["identity"], without=without
    )


def target_questions(name: str, count: int, seed: int = 0) -> list[Question]:
    """``count`` prompts that name the concept, each about the concept itself."""
    name, category = find_concept(name)
    asked = _prompts(category, name, count, seed_of("target", name, seed))
    return [Question(p, seed_of("target", name, seed, i), category) for i, p in enumerate(asked)]


def retain_questions(category: str, count: int, seed: int = 0, without: Sequence[str] = ()) -> list[Question]:
    """``count`` prompts about concepts of one category, evenly over all of them but those in ``without``.

    No prompt names anything in ``without``. The same questions come first whatever the count.
    """
    left_out = tuple(find_concept(name)[0] for name in without)
    # a prompt about one category also says something of the others
    for each in (category, *CATEGORIES):
        if all(word.name in left_out for word in vocabulary.CATEGORIES[each]):
            raise RequestError(f"No {each} is left that could be kept: forget fewer of them.")
    names = [word.name for word in vocabulary.CATEGORIES[category] if word.name not in left_out]
    order = np.random.default_rng(seed_of("order", category, seed)).permutation(len(names))
    found = []
    for i in range(count):
        name = names[order[i % len(names)]]
        (prompt,) = _prompts(category, name, 1, seed_of("kept", category, seed, i), left_out)
        found.append(Question(prompt, seed_of("kept", category, seed, i, prompt.text), category))
    return found


@dataclass(frozen=True)
class EvaluationTarget:
    """A concept to measure, and the patches (each at a strength) that are to have removed it."""

    concept: str
    patches: tuple[tuple[Patch, float], ...]


@dataclass(frozen=True)
class Scores:
    """What one variant of the model does, each a fraction with its interval and ``n``.

    - ``ua``: share of the target's prompts in which the probe does not find the target;
    - ``ira``, ``cra``: how often it finds the concept asked about in prompts *without* the target, for concepts of the
      target's category and of the two others, as a share of the unedited model's on the same prompts and seeds;
    - ``cra_target``: the same for everything else that the target's own prompts name (object, style, identity,
      colour), each attribute a trial.
    """

    ua: Score
    ira: Score
    cra: Score
    cra_target: Score

    def as_dict(self) -> dict[str, dict[str, float | int]]:
        return {name: getattr(self, name).as_dict() for name in ("ua", "ira", "cra", "cra_target")}


@dataclass(frozen=True)
class Example:
    """The same prompt and seed before and after, for the eye: two ``(3, H, W)`` uint8 pictures."""

    prompt: str
    seed: int
    before: LabeledImage
    after: LabeledImage


@dataclass(frozen=True)
class Evaluation:
    """One concept, measured: :class:`Scores` of each variant by name, counts, and a few pictures.

    ``accuracy`` is the unedited model's own share of right answers behind ``ira``, ``cra`` and ``cra_target``.
    ``drift``, by variant, is how far it moves the pictures of what is kept: the root-mean-square difference, over the
    pixels and channels in [0, 1], between its picture and the unedited model's of the same prompt and seed, as the mean
    over the ``n_kept`` prompts. It sees what the probe does not: a picture that still shows what was asked for, and is
    another one.

    A benchmark also gives UA ``by_kind`` of the target's prompts, then by variant, and of ``ira``, by variant, the part
    that asks for ``neighbours``, where it names some and the unedited model draws any of them right.
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

    def as_dict(self) -> dict[str, object]:
        return {
            "concept": self.concept,
            "category": self.category,
            "n_target": self.n_target,
            "n_kept": self.n_kept,
            "scores": {name: scores.as_dict() for name, scores in self.scores.items()},
            "unedited_accuracy": {name: score.as_dict() for name, score in self.accuracy.items()},
            "drift": dict(self.drift),
        }


@dataclass(frozen=True)
class QuestionSets:
    """What is asked about one concept: about itself, about others of its category, about those of other categories.

    ``near`` names those of the same category that are its neighbours.
    """

    target: list[Question]
    in_domain: list[Question]
    cross_domain: list[Question]
    neighbours: tuple[str, ...] = ()

    @property
    def all(self) -> list[Question]:
        return [*self.target, *self.in_domain, *self.cross_domain]


@dataclass(frozen=True)
class EvaluationPlan:
    """What is to be drawn to measure one concept: the cells, by each variant of the model. One is :data:`UNEDITED`."""

    concept: str
    category: str
    cells: QuestionSets
    variants: Mapping[str, Variant]

    def request(self, cache: SampleCache) -> None:
        """Ask for all its pictures."""
        for variant in self.variants.values():
            cache.request(variant, [question.picture for question in self.cells.all])


def check_baselines(baselines: Sequence[str]) -> None:
    """Raises :class:`RequestError` for a baseline that is none of :data:`BASELINES`."""
    if unknown := [name for name in baselines if name not in BASELINES]:
        raise RequestError(f"The baseline '{unknown[0]}' is not known: choose among {', '.join(BASELINES)}.")


def build_variants(
    name: str, patches: tuple[tuple[Patch, float], ...], baselines: Sequence[str] = BASELINES
) -> dict[str, Variant]:
    """The variants of the model that are compared about a concept; the unedited one is always among them."""
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
    """The questions of the embedded model's own world about each subject; see :func:`evaluate`, and what it raises."""
    if count < MIN_COUNT:
        raise RequestError(f"{count} pictures a cell measure nothing: ask for at least {MIN_COUNT}.")
    if not targets:
        raise RequestError("There is no concept to evaluate: name at least one.")
    check_baselines(baselines)
    named = [find_concept(subject.concept) for subject in targets]
    left_out = tuple(dict.fromkeys([name for name, _ in named] + [find_concept(name)[0] for name in without]))
    pools = {category: retain_questions(category, count, seed, left_out) for category in CATEGORIES}
    plans = []
    for subject, (name, category) in zip(targets, named, strict=True):
        first, second = (c for c in CATEGORIES if c != category)
        other = [*pools[first][: count - count // 2], *pools[second][: count // 2]]
        cells = QuestionSets(target_questions(name, count, seed), pools[category], other)
        plans.append(EvaluationPlan(name, category, cells, build_variants(name, subject.patches, baselines)))
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
    """Measure every subject with ``count`` pictures in each of its three cells (target, same category, other ones).

    Prompts about what is kept name none of the subjects nor of ``without``, so that all subjects share them and the
    unedited model draws them once. ``baselines`` are any of :data:`UNEDITED`, :data:`NEGATIVE` and :data:`SAFE` (its
    published medium configuration, which takes three passes a step for two). ``cache`` shares pictures with other
    measurements of the same model; its own model, probe and sampling then count. Raises :class:`RequestError` for
    concepts the probe does not know, too few pictures or an unknown baseline, and
    :class:`ForgetConceptError` where the unedited model itself draws nothing right.
    """
    plans = world_plans(targets, count, seed, without=without, baselines=baselines)
    cache = cache or SampleCache(model, probe, sampling or SamplingSettings())
    for plan in plans:
        plan.request(cache)
    cache.generate(progress)
    return [score_plan(cache, plan, baselines) for plan in plans]


def _right(questions: Sequence[Question], seen: Sequence[LabeledImage]) -> list[bool]:
    return [question.is_correct(one) for question, one in zip(questions, seen, strict=True)]


def _right_otherwise(questions: Sequence[Question], seen: Sequence[LabeledImage]) -> list[bool]:
    return [
        getattr(one.labels, attribute) == getattr(question.prompt.expected, attribute)
        for question, one in zip(questions, seen, strict=True)
        for attribute in question.other_attributes()
    ]


def image_distance(before: Sequence[LabeledImage], after: Sequence[LabeledImage]) -> float:
    """Root-mean-square difference of the pixels in [0, 1] of pictures, pair by pair; the mean over the pairs."""
    distances = [
        float((b.picture.float() - a.picture.float()).square().mean().sqrt()) / 255
        for b, a in zip(before, after, strict=True)
    ]
    return sum(distances) / len(distances)


def score_variant(cache: SampleCache, plan: EvaluationPlan, variant: str) -> dict[str, Score | None]:
    """What one variant was drawn to do, counted part by part: the four of :class:`Scores`, ``neighbours`` and ``ua_*``.

    The last are UA of each kind of the target's prompts. ``None`` where nothing can be said: no such question was
    asked, or the unedited model answers none of them.
    """
    cells = plan.cells

    def outcomes(name: str) -> dict[str, list[bool]]:
        def seen(questions: Sequence[Question]) -> list[LabeledImage]:
            return cache.get(plan.variants[name], [question.picture for question in questions])

        same = _right(cells.in_domain, seen(cells.in_domain))
        return {
            "ua": [not found for found in _right(cells.target, seen(cells.target))],
            "ira": same,
            "cra": _right(cells.cross_domain, seen(cells.cross_domain)),
            "cra_target": _right_otherwise(cells.target, seen(cells.target)),
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
    """How far one variant moves the pictures of what is kept: :attr:`Evaluation.drift`."""
    pictures = [question.picture for question in (*plan.cells.in_domain, *plan.cells.cross_domain)]
    before, after = (cache.get(plan.variants[name], pictures) for name in (UNEDITED, variant))
    return image_distance(before, after)


def score_plan(cache: SampleCache, plan: EvaluationPlan, baselines: Sequence[str] = BASELINES) -> Evaluation:
    """What was drawn as planned, counted. :data:`UNEDITED` is among the scores where it is among ``baselines``.

    Raises :class:`ForgetConceptError` where the unedited model draws nothing of a cell right, so that nothing
    can be said of what is kept.
    """
    cells, variants = plan.cells, plan.variants

    def seen(variant: str, questions: Sequence[Question]) -> list[LabeledImage]:
        return cache.get(variants[variant], [question.picture for question in questions])

    on_target = seen(UNEDITED, cells.target)
    base = {
        "ira": _right(cells.in_domain, seen(UNEDITED, cells.in_domain)),
        "cra": _right(cells.cross_domain, seen(UNEDITED, cells.cross_domain)),
        "cra_target": _right_otherwise(cells.target, on_target),
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
                Score.ratio(answers, answers)  # raises, in words
        known = {part: score for part, score in found.items() if score is not None}
        scores[variant] = Scores(*(known[part] for part in ("ua", "ira", "cra", "cra_target")))
        for part, score in known.items():
            if part.startswith("ua_"):
                by_kind.setdefault(part[3:], {})[variant] = score
        if near is not None:
            neighbours[variant] = near
        drift[variant] = image_drift(cache, plan, variant)

    def examples(questions: Sequence[Question]) -> tuple[Example, ...]:
        before, after = seen(UNEDITED, questions), seen(PATCHED, questions)
        return tuple(Example(q.prompt.text, q.seed, b, a) for q, b, a in zip(questions, before, after, strict=True))

    # one example of its own category and of each other one; concepts that share their prompts show different ones
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
    )
