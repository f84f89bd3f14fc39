"""Generalization erosion: what a sequence of requests does to concepts that none of them named.

DUGE (arXiv 2503.13769): after every request each kept concept is asked for again, and what is lost is counted against
the base model, never against the step before, so that small losses which add up are seen. Beside it the two drifts that
go before a loss: of the pictures at equal seeds, and of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import RequestError
from ..methods.sequence import History
from ..mini import vocabulary
from ..models.latent_diffusion import LatentDiffusion
from ..patch.history import read_history
from ..patch.patch import Patch
from ..progress import Progress
from .drawing import ImageClassifier, LabeledImage, SampleCache, SamplingSettings, Variant
from .intervals import Score
from .metrics.mean import Mean
from .metrics.perceptual import PairDistance, perceptual_distance
from .scores import CATEGORIES, MIN_COUNT, Question, find_concept, image_distance, retain_questions
from .weight_drift import WeightDrift, weight_drift

__all__ = ["ErosionStep", "erosion"]


@dataclass(frozen=True)
class ErosionStep:
    """What one step of a sequence has cost so far, against the base model on the same prompts and seeds.

    - ``forgotten``: every name forgotten up to this step;
    - ``erosion``: the share of what the base model draws right that is lost, over all kept concepts, with a 95 %
      interval; below 0 where more is right than before;
    - ``by_category``: the same for each category;
    - ``by_concept``: of each kept concept the change in its share of right pictures, ``before − after``;
    - ``distance``: root-mean-square difference of the pixels in [0, 1] between the step's picture and the base model's,
      the mean over all kept prompts; ``perceptual`` the same by another distance, where one was given;
    - ``weights``: how far the weights have moved.
    """

    step: int
    forgotten: tuple[str, ...]
    erosion: Score
    by_category: Mapping[str, Score]
    by_concept: Mapping[str, float]
    distance: float
    weights: WeightDrift
    perceptual: Mean | None = None

    def as_dict(self) -> dict[str, object]:
        return {
            "step": self.step,
            "forgotten": list(self.forgotten),
            "erosion": self.erosion.as_dict(),
            "by_category": {name: score.as_dict() for name, score in self.by_category.items()},
            "by_concept": dict(self.by_concept),
            "distance": self.distance,
            "perceptual": None if self.perceptual is None else self.perceptual.as_dict(),
            "weights": self.weights.as_dict(),
        }


def erosion(
    model: LatentDiffusion,
    probe: ImageClassifier,
    steps: Sequence[Patch | History],
    count: int = 64,
    seed: int = 0,
    sampling: SamplingSettings | None = None,
    *,
    forgotten: Sequence[Sequence[str]] | None = None,
    without: Sequence[str] = (),
    perceptual: PairDistance | None = None,
    cache: SampleCache | None = None,
    progress: Progress | None = None,
) -> list[ErosionStep]:
    """Measure each of ``steps``, the whole patch (or history) as it stood after each request, with ``count`` pictures
    of each category.

    What is forgotten is read from the patches' records; ``forgotten`` says it instead, the names up to each step. Kept
    are all concepts of the world that no step forgets and that are not in ``without``: every step answers the same
    questions. ``cache`` shares pictures with other measurements. Raises :class:`RequestError` for too few pictures,
    no steps, names that the probe does not know and a category of which nothing is kept,
    :class:`PatchError` for a patch without a record or for another model, and
    :class:`ForgetConceptError` where the base model draws nothing of a category right.
    """
    if count < MIN_COUNT:
        raise RequestError(f"{count} pictures a category measure nothing: ask for at least {MIN_COUNT}.")
    if not steps:
        raise RequestError("There is no step to measure: give at least one patch.")
    patches = [step.patch if isinstance(step, History) else step for step in steps]
    if forgotten is None:
        forgotten = [[concept.name for concept in read_history(patch.metadata).concepts] for patch in patches]
    if len(forgotten) != len(patches):
        raise RequestError(f"There are {len(patches)} steps, and names of {len(forgotten)}: give the names of each.")
    named = [*(name for names in forgotten for name in names), *without]
    gone = tuple(dict.fromkeys(find_concept(name)[0] for name in named))
    if empty := [c for c in CATEGORIES if all(word.name in gone for word in vocabulary.CATEGORIES[c])]:
        raise RequestError(f"No {empty[0]} is kept, so there are no prompts to measure erosion with: forget fewer.")
    questions = {category: retain_questions(category, count, seed, gone) for category in CATEGORIES}
    drifts = [weight_drift(model.survey, patch) for patch in patches]
    cache = cache or SampleCache(model, probe, sampling or SamplingSettings())
    base, variants = Variant(), [Variant(((patch, 1.0),)) for patch in patches]
    asked = [question for several in questions.values() for question in several]
    pictures = [question.picture for question in asked]
    for variant in (base, *variants):
        cache.request(variant, pictures)
    cache.generate(progress)
    before = cache.get(base, pictures)
    return [
        _step(number + 1, names, asked, before, cache.get(variant, pictures), drift, perceptual)
        for number, (names, variant, drift) in enumerate(zip(forgotten, variants, drifts, strict=True))
    ]


def _step(
    number: int,
    names: Sequence[str],
    asked: Sequence[Question],
    before: Sequence[LabeledImage],
    after: Sequence[LabeledImage],
    weights: WeightDrift,
    perceptual: PairDistance | None,
) -> ErosionStep:
    rows = list(range(len(asked)))
    was = [question.is_correct(seen) for question, seen in zip(asked, before, strict=True)]
    still = [question.is_correct(seen) for question, seen in zip(asked, after, strict=True)]

    def lost(some: Sequence[int]) -> Score:
        return Score.ratio([still[i] for i in some], [was[i] for i in some]).complement

    categories = {name: [i for i in rows if asked[i].category == name] for name in CATEGORIES}
    concepts: dict[str, list[int]] = {}
    for i in rows:
        concepts.setdefault(asked[i].expected, []).append(i)
    distance = None
    if perceptual is not None:
        first, second = (torch.stack([seen.picture for seen in several]) for several in (before, after))
        distance = perceptual_distance(perceptual, first, second)
    return ErosionStep(
        number,
        tuple(names),
        lost(rows),
        {name: lost(some) for name, some in categories.items()},
        {
            name: (sum(was[i] for i in some) - sum(still[i] for i in some)) / len(some)
            for name, some in concepts.items()
        },
        image_distance(before, after),
        weights,
        distance,
    )
