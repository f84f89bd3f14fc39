"""What was forgotten and what was kept: UA, IRA, CRA, measured by asking a probe about drawn pictures.

The words are UnlearnCanvas' (arXiv 2402.11846): unlearning accuracy, in-domain and cross-domain retain accuracy. Every
picture has its own fixed seed, the same for each variant of the model, so that two variants are compared picture by
picture. Baselines stand beside a patch: the unedited model, and the concept as a negative prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..concepts import normalised
from ..diffusion import LatentDiffusion
from ..errors import RequestError
from ..mini import vocabulary, world
from ..patch import Patch
from ..progress import Progress
from .drawing import Drawings, Picture, Probe, Sampling, Seen, Variant
from .intervals import Score

__all__ = [
    "NEGATIVE",
    "PATCHED",
    "UNEDITED",
    "Evaluation",
    "Example",
    "Question",
    "Scores",
    "Subject",
    "evaluate",
    "kept_questions",
    "known_concept",
    "target_questions",
]

CATEGORIES = ("object", "style", "identity")
ATTRIBUTES = (*CATEGORIES, "colour")
PATCHED, UNEDITED, NEGATIVE = "patched", "unedited", "negative_prompt"
FEWEST, EXAMPLES = 4, 3


def known_concept(name: str) -> tuple[str, str]:
    """The name as the embedded model's world writes it, and its category.

    Raises :class:`RequestError` for a concept the probe cannot see, listing those it can.
    """
    for category, words in vocabulary.CATEGORIES.items():
        for word in words:
            if normalised(word.name) == normalised(name):
                return word.name, category
    known = "; ".join(f"{c}: {', '.join(w.name for w in words)}" for c, words in vocabulary.CATEGORIES.items())
    raise RequestError(f"The probe knows no concept '{name}', so it cannot be measured; it knows {known}.")


@dataclass(frozen=True)
class Question:
    """A picture and the attribute that is asked about: does the probe find what the prompt says of ``category``?"""

    prompt: world.Prompt
    seed: int
    category: str

    @property
    def picture(self) -> Picture:
        return Picture(self.prompt.text, self.seed)

    @property
    def wanted(self) -> str:
        return getattr(self.prompt.asks, self.category)

    def answered(self, seen: Seen) -> bool:
        """Whether the probe finds what was prompted."""
        return getattr(seen.labels, self.category) == self.wanted

    def others(self) -> list[str]:
        """The other attributes that the prompt names."""
        return [a for a in ATTRIBUTES if a != self.category and getattr(self.prompt.asks, a) != vocabulary.NONE]


def _seed(*parts: object) -> int:
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little") // 2


def _prompts(category: str, name: str, count: int, seed: int, without: tuple[str, ...] = ()) -> list[world.Prompt]:
    about = {"object": None, "style": None, "identity": None, category: name}
    return world.prompts(
        count, seed, object=about["object"], style=about["style"], identity=about["identity"], without=without
    )


def target_questions(name: str, count: int, seed: int = 0) -> list[Question]:
    """``count`` prompts that name the concept, each about the concept itself."""
    name, category = known_concept(name)
    asked = _prompts(category, name, count, _seed("target", name, seed))
    return [Question(p, _seed("target", name, seed, i), category) for i, p in enumerate(asked)]


def kept_questions(category: str, count: int, seed: int = 0, without: Sequence[str] = ()) -> list[Question]:
    """``count`` prompts about concepts of one category, evenly over all of them but those in ``without``.

    No prompt names anything in ``without``. The same questions come first whatever the count.
    """
    left_out = tuple(known_concept(name)[0] for name in without)
    names = [word.name for word in vocabulary.CATEGORIES[category] if word.name not in left_out]
    if not names:
        raise RequestError(f"No {category} is left that could be kept: forget fewer of them.")
    order = np.random.default_rng(_seed("order", category, seed)).permutation(len(names))
    found = []
    for i in range(count):
        name = names[order[i % len(names)]]
        (prompt,) = _prompts(category, name, 1, _seed("kept", category, seed, i), left_out)
        found.append(Question(prompt, _seed("kept", category, seed, i, prompt.text), category))
    return found


@dataclass(frozen=True)
class Subject:
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
    before: Seen
    after: Seen


@dataclass(frozen=True)
class Evaluation:
    """One concept, measured: :class:`Scores` of each variant by name, counts, and a few pictures.

    ``accuracy`` is the unedited model's own share of right answers behind ``ira``, ``cra`` and ``cra_target``.
    ``drift``, by variant, is how far it moves the pictures of what is kept: the root-mean-square difference, over the
    pixels and channels in [0, 1], between its picture and the unedited model's of the same prompt and seed, as the mean
    over the ``n_kept`` prompts. It sees what the probe does not: a picture that still shows what was asked for, and is
    another one.
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
class _Cells:
    target: list[Question]
    same: list[Question]
    other: list[Question]

    @property
    def all(self) -> list[Question]:
        return [*self.target, *self.same, *self.other]


def evaluate(
    model: LatentDiffusion,
    probe: Probe,
    subjects: Sequence[Subject],
    count: int = 200,
    seed: int = 0,
    sampling: Sampling | None = None,
    *,
    without: Sequence[str] = (),
    baselines: Sequence[str] = (UNEDITED, NEGATIVE),
    progress: Progress | None = None,
    drawings: Drawings | None = None,
) -> list[Evaluation]:
    """Measure every subject with ``count`` pictures in each of its three cells (target, same category, other ones).

    Prompts about what is kept name none of the subjects nor of ``without``, so that all subjects share them and the
    unedited model draws them once. ``drawings`` shares pictures with other measurements of the same model; its own
    model, probe and sampling then count. Raises :class:`RequestError` for concepts the probe does not know or too few
    pictures, and :class:`~..errors.ForgetConceptError` where the unedited model itself draws nothing right.
    """
    if count < FEWEST:
        raise RequestError(f"{count} pictures a cell measure nothing: ask for at least {FEWEST}.")
    if not subjects:
        raise RequestError("There is no concept to evaluate: name at least one.")
    named = [known_concept(subject.concept) for subject in subjects]
    left_out = tuple(dict.fromkeys([name for name, _ in named] + [known_concept(name)[0] for name in without]))
    pools = {category: kept_questions(category, count, seed, left_out) for category in CATEGORIES}
    drawings = drawings or Drawings(model, probe, sampling or Sampling())
    plans = []
    for subject, (name, category) in zip(subjects, named, strict=True):
        first, second = (c for c in CATEGORIES if c != category)
        other = [*pools[first][: count - count // 2], *pools[second][: count // 2]]
        cells = _Cells(target_questions(name, count, seed), pools[category], other)
        variants = {PATCHED: Variant(subject.patches), UNEDITED: Variant()}
        if NEGATIVE in baselines:
            variants[NEGATIVE] = Variant(negative=name)
        for variant in variants.values():
            drawings.want(variant, [question.picture for question in cells.all])
        plans.append((name, category, cells, variants))
    drawings.make(progress)
    return [_measured(drawings, *plan, baselines) for plan in plans]


def _right(questions: Sequence[Question], seen: Sequence[Seen]) -> list[bool]:
    return [question.answered(one) for question, one in zip(questions, seen, strict=True)]


def _right_otherwise(questions: Sequence[Question], seen: Sequence[Seen]) -> list[bool]:
    return [
        getattr(one.labels, attribute) == getattr(question.prompt.asks, attribute)
        for question, one in zip(questions, seen, strict=True)
        for attribute in question.others()
    ]


def _drift(before: Sequence[Seen], after: Sequence[Seen]) -> float:
    distances = [
        float((b.picture.float() - a.picture.float()).square().mean().sqrt()) / 255
        for b, a in zip(before, after, strict=True)
    ]
    return sum(distances) / len(distances)


def _measured(
    drawings: Drawings,
    name: str,
    category: str,
    cells: _Cells,
    variants: Mapping[str, Variant],
    baselines: Sequence[str],
) -> Evaluation:
    def seen(variant: str, questions: Sequence[Question]) -> list[Seen]:
        return drawings.seen(variants[variant], [question.picture for question in questions])

    def outcomes(variant: str) -> dict[str, list[bool]]:
        on_target = seen(variant, cells.target)
        return {
            "ua": [not found for found in _right(cells.target, on_target)],
            "ira": _right(cells.same, seen(variant, cells.same)),
            "cra": _right(cells.other, seen(variant, cells.other)),
            "cra_target": _right_otherwise(cells.target, on_target),
        }

    base = outcomes(UNEDITED)
    kept_cells = [*cells.same, *cells.other]
    kept_before = seen(UNEDITED, kept_cells)
    scores, drift = {}, {}
    for variant in variants:
        if variant == UNEDITED and UNEDITED not in baselines:
            continue
        got = outcomes(variant)
        kept = {part: Score.ratio(got[part], base[part]) for part in ("ira", "cra", "cra_target")}
        scores[variant] = Scores(Score.share(got["ua"]), **kept)
        drift[variant] = _drift(kept_before, seen(variant, kept_cells))

    def examples(questions: Sequence[Question]) -> tuple[Example, ...]:
        before, after = seen(UNEDITED, questions), seen(PATCHED, questions)
        return tuple(Example(q.prompt.text, b, a) for q, b, a in zip(questions, before, after, strict=True))

    # one example of its own category and of each other one; concepts that share their prompts show different ones
    at = CATEGORIES.index(category)
    shown = [cells.same[at], cells.other[at % (len(cells.other) // 2)], cells.other[-1 - at % (len(cells.other) // 2)]]
    return Evaluation(
        name,
        category,
        len(cells.target),
        len(cells.same) + len(cells.other),
        scores,
        {part: Score.share(base[part]) for part in ("ira", "cra", "cra_target")},
        examples(cells.target[:EXAMPLES]),
        examples(shown),
        drift,
    )
