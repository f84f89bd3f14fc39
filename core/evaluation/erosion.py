"""Generalization erosion: the loss of concepts that no request of a sequence names.

After every request each retained concept is evaluated again. The loss is counted against the base model and not
against the previous step, so that small losses which accumulate remain visible. Two drifts that precede a loss are
measured as well: of the images at equal seeds, and of the weights.

Reference: DUGE, arXiv 2503.13769.
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
from .questions import CATEGORIES, Question, find_concept, retain_questions
from .scores import MIN_COUNT, image_distance
from .weight_drift import WeightDrift, weight_drift

__all__ = ["ErosionStep", "erosion"]


@dataclass(frozen=True)
class ErosionStep:
    """Cumulative erosion after one step of a sequence, against the base model on the same prompts and seeds.

    Attributes:
        step: Number of the step, from 1.
        forgotten: All names forgotten up to this step.
        erosion: Fraction of the base model's correct images that is lost, over all retained concepts, with a 95 %
            interval. It is negative if the step has more correct images than the base model.
        by_category: The same for each category.
        by_concept: Change in accuracy of each retained concept, ``before - after``.
        distance: Root-mean-square pixel difference, in [0, 1], between the images of this step and of the base model;
            mean over all retained prompts.
        weights: Relative change of the weights.
        perceptual: The mean of another image distance, if one was given.
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
    """Measure generalization erosion after each step of a sequence of requests.

    The retain set is every concept of the embedded world that no step forgets and that is not in ``without``; all
    steps are evaluated on the same questions.

    Args:
        model: The embedded model.
        probe: Classifies the images.
        steps: The complete patch (or history) after each request.
        count: Images per category.
        seed: Seed of the prompts and of the images.
        sampling: Sampling settings. Default: :class:`SamplingSettings`.
        forgotten: Names forgotten up to each step. Default: read from the patches' metadata.
        without: Further names to exclude from the retain set.
        perceptual: An additional image distance.
        cache: Shares images with other measurements; its model, probe and sampling settings take precedence.
        progress: Receives sampling progress.

    Returns:
        One :class:`ErosionStep` per step.

    Raises:
        RequestError: If there are too few images, no steps, unknown names, or a category with an empty retain set.
        PatchError: If a patch has no request history or belongs to another model.
        ForgetConceptError: If the base model draws no image of a category correctly.

    Reference: DUGE, arXiv 2503.13769.
    """
    if count < MIN_COUNT:
        raise RequestError(f"{count} images per category are too few to measure: use at least {MIN_COUNT}.")
    if not steps:
        raise RequestError("There are no steps to measure: pass at least one patch.")
    patches = [step.patch if isinstance(step, History) else step for step in steps]
    if forgotten is None:
        forgotten = [[concept.name for concept in read_history(patch.metadata).concepts] for patch in patches]
    if len(forgotten) != len(patches):
        raise RequestError(
            f"There are {len(patches)} steps but forgotten names for {len(forgotten)}: pass the names for each step."
        )
    named = [*(name for names in forgotten for name in names), *without]
    gone = tuple(dict.fromkeys(find_concept(name)[0] for name in named))
    if empty := [c for c in CATEGORIES if all(word.name in gone for word in vocabulary.CATEGORIES[c])]:
        raise RequestError(
            f"The retain set contains no {empty[0]}, so erosion cannot be measured: forget fewer concepts."
        )
    questions = {category: retain_questions(category, count, seed, gone) for category in CATEGORIES}
    drifts = [weight_drift(model.survey, patch) for patch in patches]
    cache = cache or SampleCache(model, probe, sampling or SamplingSettings())
    base, variants = Variant(), [Variant(((patch, 1.0),)) for patch in patches]
    all_questions = [question for several in questions.values() for question in several]
    pictures = [question.picture for question in all_questions]
    for variant in (base, *variants):
        cache.request(variant, pictures)
    cache.generate(progress)
    before = cache.get(base, pictures)
    return [
        _step(number + 1, names, all_questions, before, cache.get(variant, pictures), drift, perceptual)
        for number, (names, variant, drift) in enumerate(zip(forgotten, variants, drifts, strict=True))
    ]


def _step(
    number: int,
    names: Sequence[str],
    questions: Sequence[Question],
    before: Sequence[LabeledImage],
    after: Sequence[LabeledImage],
    weights: WeightDrift,
    perceptual: PairDistance | None,
) -> ErosionStep:
    rows = list(range(len(questions)))
    correct_before = [question.is_correct(image) for question, image in zip(questions, before, strict=True)]
    correct_after = [question.is_correct(image) for question, image in zip(questions, after, strict=True)]

    def loss(subset: Sequence[int]) -> Score:
        return Score.ratio([correct_after[i] for i in subset], [correct_before[i] for i in subset]).complement

    categories = {name: [i for i in rows if questions[i].category == name] for name in CATEGORIES}
    concepts: dict[str, list[int]] = {}
    for i in rows:
        concepts.setdefault(questions[i].expected, []).append(i)
    distance = None
    if perceptual is not None:
        first, second = (torch.stack([image.picture for image in images]) for images in (before, after))
        distance = perceptual_distance(perceptual, first, second)
    return ErosionStep(
        number,
        tuple(names),
        loss(rows),
        {name: loss(subset) for name, subset in categories.items()},
        {
            name: (sum(correct_before[i] for i in subset) - sum(correct_after[i] for i in subset)) / len(subset)
            for name, subset in concepts.items()
        },
        image_distance(before, after),
        weights,
        distance,
    )
