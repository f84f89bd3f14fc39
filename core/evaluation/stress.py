"""Stress tests of a patch: held-out wordings, lower strengths, and images that start from the concept.

UA on the templates of a fit is the easiest question. These tests measure whether other wordings bring the concept back,
what a strength below 1 leaves of it, and whether a picture of it can be continued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..models.autoencoders import encode_images
from ..models.images import from_bytes
from ..models.sampling_start import Start
from ..patch.patch import Patch
from ..progress import Progress
from .drawing import LabeledImage, Picture, SampleCache, Variant, draw
from .intervals import Score
from .questions import Question
from .retention import Retained, retained_scores, with_distances
from .scores import PATCHED, UNEDITED, EvaluationPlan
from .wordings import WORDINGS, wording_questions

__all__ = [
    "FULL",
    "STRENGTHS",
    "ImageToImage",
    "StrengthScores",
    "StressPlan",
    "StressScores",
    "StressSettings",
    "WordingScores",
    "image_to_image",
    "nearest_names",
    "strength_scores",
    "stress_plan",
    "stress_scores",
    "wording_scores",
]

STRENGTHS = (0.5, 0.7)
# names of the retain set that the tests of one concept draw; of more, half are the nearest ones
_MOST_KEPT = 40


@dataclass(frozen=True)
class StressSettings:
    """How many images the stress tests draw.

    Args:
        target: Questions of each wording about the concept.
        kept: Questions of each wording about every concept of the retain set.
        strengths: Further strengths, as factors of those given.
        continued: Images that start from a picture of the concept, for each prompt.
        noise: Share of the sampler's steps that these are noised by and drawn again.
    """

    target: int = 12
    kept: int = 3
    strengths: tuple[float, ...] = STRENGTHS
    continued: int = 24
    noise: float = 0.5


FULL = StressSettings()


@dataclass(frozen=True)
class WordingScores:
    """One held-out wording.

    Attributes:
        concept: The forgotten concept.
        wording: The wording, one of :data:`WORDINGS`.
        shown: Share of the unedited model's images that show the concept; if it is 0 the wording says nothing.
        forgotten: Of these images, the share in which the patched model shows it no longer; ``None`` if there is none.
        kept: Accuracy of the retain set in this wording, relative to the unedited model.
    """

    concept: str
    wording: str
    shown: Score
    forgotten: Score | None
    kept: Score | None

    def as_dict(self) -> dict[str, object]:
        return {
            "concept": self.concept,
            "wording": self.wording,
            "shown": self.shown.as_dict(),
            "forgotten": None if self.forgotten is None else self.forgotten.as_dict(),
            "kept": None if self.kept is None else self.kept.as_dict(),
        }


@dataclass(frozen=True)
class StrengthScores:
    """UA and IRA of a patch at a ``strength``, a factor of the given one."""

    concept: str
    strength: float
    ua: Score
    ira: Score

    def as_dict(self) -> dict[str, object]:
        return {
            "concept": self.concept,
            "strength": self.strength,
            "ua": self.ua.as_dict(),
            "ira": self.ira.as_dict(),
        }


@dataclass(frozen=True)
class ImageToImage:
    """Images of the concept, noised and drawn again, that still show it.

    Attributes:
        concept: The concept.
        prompt: ``"named"``: with the prompts that name it; ``"empty"``: with the empty prompt.
        noise: Share of the sampler's steps that are drawn again.
        before: Share of the unedited model's images.
        after: Share of the patched model's images.
    """

    concept: str
    prompt: str
    noise: float
    before: Score
    after: Score

    def as_dict(self) -> dict[str, object]:
        return {
            "concept": self.concept,
            "prompt": self.prompt,
            "noise": self.noise,
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
        }


@dataclass(frozen=True)
class StressPlan:
    """The questions of the stress tests for one concept, and the variants that answer them."""

    concept: str
    category: str
    plan: EvaluationPlan
    target: list[Question]
    kept: list[Question]
    weaker: Mapping[float, Variant]

    def request(self, cache: SampleCache) -> None:
        """Register all images of the plan in the cache."""
        for variant in (UNEDITED, PATCHED):
            cache.request(self.plan.variants[variant], [q.picture for q in (*self.target, *self.kept)])
        for weaker in self.weaker.values():
            cache.request(weaker, [q.picture for q in (*self.plan.cells.target, *self.plan.cells.in_domain)])


def stress_plan(
    plan: EvaluationPlan,
    patches: Sequence[tuple[Patch, float]],
    names: Mapping[str, Sequence[str]],
    settings: StressSettings = FULL,
    seed: int = 0,
) -> StressPlan:
    """Return the questions of the stress tests for the concept of a plan.

    Args:
        plan: The plan of UA, IRA and CRA.
        patches: The patches with their strengths.
        names: The retain set by category, without the concepts to forget.
        settings: How much to draw.
        seed: Seed of prompts and images.
    """
    target = wording_questions(plan.concept, plan.category, settings.target, seed, names)
    kept = [
        question
        for category, found in names.items()
        for name in found
        for question in wording_questions(name, category, settings.kept, seed, names)
    ]
    weaker = {
        factor: Variant(tuple((patch, strength * factor) for patch, strength in patches))
        for factor in settings.strengths
    }
    return StressPlan(plan.concept, plan.category, plan, target, kept, weaker)


@dataclass(frozen=True)
class StressScores:
    """All results for one concept; ``retained`` are the concepts of the retain set over all wordings."""

    wordings: tuple[WordingScores, ...]
    strengths: tuple[StrengthScores, ...]
    image_to_image: tuple[ImageToImage, ...]
    retained: tuple[Retained, ...]


def nearest_names(names: Mapping[str, Sequence[str]], distances: Mapping[str, float]) -> dict[str, list[str]]:
    """Return all names, or of many the nearest ones and others from all distances.

    Args:
        names: The retain set by category.
        distances: Distances of these names to the forgotten concept.
    """
    order = sorted(distances, key=lambda name: distances[name])
    half = _MOST_KEPT // 2
    far = order[half:]
    chosen = {*order[:half], *(far[i * len(far) // half] for i in range(half) if far)}
    return {category: [name for name in found if name in chosen] for category, found in names.items()}


def stress_scores(
    cache: SampleCache,
    stress: StressPlan,
    settings: StressSettings,
    distances: Mapping[str, float],
    progress: Progress | None = None,
) -> StressScores:
    """Draw what is missing of a plan, and score it.

    Args:
        cache: The images.
        stress: The plan.
        settings: How much to draw.
        distances: Distances of the retain set's names to the concept.
        progress: Receives progress.
    """
    stress.request(cache)
    cache.generate(progress)
    wordings, retained = wording_scores(cache, stress)
    return StressScores(
        wordings,
        strength_scores(cache, stress),
        image_to_image(cache, stress, settings, progress),
        with_distances(retained, distances),
    )


def wording_scores(cache: SampleCache, stress: StressPlan) -> tuple[tuple[WordingScores, ...], tuple[Retained, ...]]:
    """Score the held-out wordings, and every concept of the retain set over all of them."""
    before, after = (stress.plan.variants[variant] for variant in (UNEDITED, PATCHED))

    def images(variant: Variant, questions: Sequence[Question]) -> list[LabeledImage]:
        return cache.get(variant, [question.picture for question in questions])

    found = []
    for wording in WORDINGS:
        target, kept = ([q for q in questions if q.kind == wording] for questions in (stress.target, stress.kept))
        rows = list(zip(target, images(before, target), images(after, target), strict=True))
        shown = [question.is_correct(was) for question, was, _ in rows]
        gone = [not question.is_correct(now) for question, was, now in rows if question.is_correct(was)]
        right = [q.is_correct(image) for q, image in zip(kept, images(before, kept), strict=True)]
        still = [q.is_correct(image) for q, image in zip(kept, images(after, kept), strict=True)]
        found.append(
            WordingScores(
                stress.concept,
                wording,
                Score.share(shown),
                Score.share(gone) if gone else None,
                Score.ratio(still, right) if any(right) else None,
            )
        )
    retained = retained_scores(stress.kept, images(before, stress.kept), images(after, stress.kept))
    return tuple(found), retained


def strength_scores(cache: SampleCache, stress: StressPlan) -> tuple[StrengthScores, ...]:
    """Score the concept's own prompts and those of its category at every strength, the given one included.

    The images of the lower strengths are discarded afterwards.
    """
    cells = stress.plan.cells

    def correct(variant: Variant, questions: Sequence[Question]) -> list[bool]:
        found = cache.get(variant, [question.picture for question in questions])
        return [question.is_correct(image) for question, image in zip(questions, found, strict=True)]

    base = correct(stress.plan.variants[UNEDITED], cells.in_domain)
    found = tuple(
        StrengthScores(
            stress.concept,
            factor,
            Score.share([not shown for shown in correct(variant, cells.target)]),
            Score.ratio(correct(variant, cells.in_domain), base),
        )
        for factor, variant in {**stress.weaker, 1.0: stress.plan.variants[PATCHED]}.items()
    )
    for weaker in stress.weaker.values():
        cache.discard(weaker)
    return found


@torch.no_grad()
def image_to_image(
    cache: SampleCache, stress: StressPlan, settings: StressSettings = FULL, progress: Progress | None = None
) -> tuple[ImageToImage, ...]:
    """Noise the unedited model's images of the concept half way, and draw the rest with and without the patch.

    A patch edits how text is read. Half way, a picture tells the model what it shows without any text, so that a patch
    can do little with the empty prompt: the figure tells what it does not protect.

    Args:
        cache: Holds the unedited model's images of the concept's own prompts.
        stress: The plan.
        settings: How much to draw.
        progress: Receives progress.

    Returns:
        A score for the prompts that name the concept and one for the empty prompt; none if the unedited model draws no
        image of it, or the model has no autoencoder to encode them with.
    """
    model, target = cache.model, stress.plan.cells.target
    seen = cache.get(stress.plan.variants[UNEDITED], [question.picture for question in target])
    shows = [(q, image) for q, image in zip(target, seen, strict=True) if q.is_correct(image)][: settings.continued]
    if not shows or model.vae is None:
        return ()
    latents = encode_images(model.vae, from_bytes(torch.stack([image.picture for _, image in shows])), progress)
    first = round((1 - settings.noise) * cache.sampling.steps)

    def share(variant: Variant, prompts: Sequence[str]) -> Score:
        pictures = [Picture(prompt, question.seed + 1) for prompt, (question, _) in zip(prompts, shows, strict=True)]
        found = draw(model, pictures, variant, cache.sampling, progress, Start(latents, first))
        labels = [one for images in found for one in cache.probe.classify(from_bytes(images))]
        return Score.share([getattr(one, stress.category) == stress.concept for one in labels])

    prompts = {"named": [question.prompt.text for question, _ in shows], "empty": [""] * len(shows)}
    before, after = (stress.plan.variants[variant] for variant in (UNEDITED, PATCHED))
    return tuple(
        ImageToImage(stress.concept, name, settings.noise, share(before, texts), share(after, texts))
        for name, texts in prompts.items()
    )
