"""How well the embedded model draws what it is asked for: the table every later figure rests on."""

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
from .scores import ATTRIBUTES

__all__ = ["MiniTable", "mini_table"]

SEED = 700_000  # away from the seeds of evaluations


@dataclass(frozen=True)
class MiniTable:
    """The probe's share of right answers by category, over the prompts that name something of that category.

    ``weakest`` is, by category, the concept drawn wrong most often (``None`` where none is), as ``(name, score)``.
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
    """Draw ``count`` held-out prompts (combinations never seen in training), ask the probe, count.

    Raises :class:`RequestError` where there are so few prompts that a category goes without one.
    """
    asked = world.prompts(count, seed, held_out_only=True)
    pictures = [Picture(prompt.text, seed + i) for i, prompt in enumerate(asked)]
    cache = SampleCache(model, probe, sampling or SamplingSettings(steps=25))
    cache.request(Variant(), pictures)
    cache.generate(progress)
    outcomes: dict[str, list[tuple[str, bool]]] = {attribute: [] for attribute in ATTRIBUTES}
    for prompt, seen in zip(asked, cache.get(Variant(), pictures), strict=True):
        for attribute, answers in outcomes.items():
            wanted = getattr(prompt.expected, attribute)
            if wanted != vocabulary.NONE:
                answers.append((wanted, getattr(seen.labels, attribute) == wanted))
    if missing := [attribute for attribute, answers in outcomes.items() if not answers]:
        raise RequestError(f"Among {count} prompts none names a {missing[0]}: ask for more.")
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
