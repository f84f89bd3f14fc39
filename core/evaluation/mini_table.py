"""Accuracy of the unedited embedded model on held-out prompts, the reference for all later measurements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import RequestError
from ..mini import vocabulary, world
from ..models.latent_diffusion import LatentDiffusion
from ..progress import Progress
from .drawing import ImageClassifier, Picture, SampleCache, SamplingSettings, Variant
from .intervals import Score
from .questions import ATTRIBUTES

__all__ = ["MiniTable", "mini_table"]

SEED = 700_000  # disjoint from the seeds of evaluations


@dataclass(frozen=True)
class MiniTable:
    """Accuracy of the embedded model.

    Attributes:
        prompts: Number of prompts.
        sampling: The sampling settings used.
        accuracy: Accuracy by category, over the prompts that name a concept of that category.
        weakest: By category, the concept with the most errors and its accuracy; ``None`` if there were no errors.
    """

    prompts: int
    sampling: SamplingSettings
    accuracy: Mapping[str, Score]
    weakest: Mapping[str, tuple[str, Score] | None]

    def as_dict(self) -> dict[str, object]:
        return {
            "prompts": self.prompts,
            "steps": self.sampling.steps,
            "guidance": self.sampling.guidance,
            "precision": self.sampling.precision,
            "accuracy": {category: score.as_dict() for category, score in self.accuracy.items()},
            "weakest": {
                category: None if found is None else {"concept": found[0], **found[1].as_dict()}
                for category, found in self.weakest.items()
            },
        }


def mini_table(
    model: LatentDiffusion,
    probe: ImageClassifier,
    count: int = 500,
    seed: int = SEED,
    sampling: SamplingSettings | None = None,
    progress: Progress | None = None,
) -> MiniTable:
    """Measure the embedded model's accuracy on held-out prompts.

    Args:
        model: The embedded model.
        probe: Classifies the images.
        count: Number of prompts, with combinations that do not occur in training.
        seed: Seed of the prompts and images.
        sampling: Sampling settings. Default: 25 steps.
        progress: Receives sampling progress.

    Raises:
        RequestError: If there are too few prompts to cover every category.
    """
    prompts = world.prompts(count, seed, held_out_only=True)
    pictures = [Picture(prompt.text, seed + i) for i, prompt in enumerate(prompts)]
    cache = SampleCache(model, probe, sampling or SamplingSettings(steps=25))
    cache.request(Variant(), pictures)
    cache.generate(progress)
    outcomes: dict[str, list[tuple[str, bool]]] = {attribute: [] for attribute in ATTRIBUTES}
    for prompt, image in zip(prompts, cache.get(Variant(), pictures), strict=True):
        for attribute, answers in outcomes.items():
            expected = getattr(prompt.expected, attribute)
            if expected != vocabulary.NONE:
                answers.append((expected, getattr(image.labels, attribute) == expected))
    if missing := [attribute for attribute, answers in outcomes.items() if not answers]:
        raise RequestError(f"None of the {count} prompts names a {missing[0]}: increase the number of prompts.")
    return MiniTable(
        count,
        cache.sampling,
        {attribute: Score.share([right for _, right in answers]) for attribute, answers in outcomes.items()},
        {attribute: _weakest(answers) for attribute, answers in outcomes.items()},
    )


def _weakest(answers: list[tuple[str, bool]]) -> tuple[str, Score] | None:
    wrong = Counter(name for name, right in answers if not right)
    if not wrong:
        return None
    ((name, _),) = wrong.most_common(1)
    return name, Score.share([right for other, right in answers if other == name])
