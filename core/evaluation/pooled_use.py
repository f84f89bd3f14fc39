"""How far a model follows its pooled vector: pictures of prompts whose tokens and pooled vector name other objects."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ModelError
from ..mini import world
from ..models.images import from_bytes
from ..models.latent_diffusion import LatentDiffusion
from ..models.text_encoders import TextEncoder
from ..models.text_entries import POOLED
from ..models.text_states import TextStates
from ..progress import Progress
from .drawing import ImageClassifier, Picture, SamplingSettings, draw
from .intervals import Score

__all__ = ["PooledUse", "pooled_use"]

SEED = 760_000  # disjoint from the seeds of evaluations


@dataclass(frozen=True)
class PooledUse:
    """Share of pictures that show an object although their tokens name another one.

    Attributes:
        concept: The object.
        tokens: What the tokens name.
        own: With the pooled vector of the object's prompt.
        third: What the pooled vector names in the other pictures.
        other: With the pooled vector of that one's prompt.
    """

    concept: str
    tokens: str
    own: Score
    third: str
    other: Score

    def as_dict(self) -> dict[str, object]:
        return {
            "concept": self.concept,
            "tokens": self.tokens,
            "own": self.own.as_dict(),
            "third": self.third,
            "other": self.other.as_dict(),
        }


class _MixedText:
    """A text encoder whose pooled vectors are those of other prompts; prompts without one keep their own."""

    def __init__(self, encoder: TextEncoder, pooled_of: Mapping[str, str]) -> None:
        self._encoder, self._pooled_of = encoder, pooled_of
        self.max_length, self.token_ids, self.phrase_ids = encoder.max_length, encoder.token_ids, encoder.phrase_ids

    def encode(self, prompts: Sequence[str]) -> TextStates:
        vectors = self._encoder.encode([self._pooled_of.get(prompt, prompt) for prompt in prompts])
        return dataclasses.replace(self._encoder.encode(prompts), pooled=vectors.pooled)


def pooled_use(
    model: LatentDiffusion,
    probe: ImageClassifier,
    concept: str = "star",
    tokens: str = "moon",
    third: str = "heart",
    count: int = 200,
    seed: int = SEED,
    sampling: SamplingSettings | None = None,
    progress: Progress | None = None,
) -> PooledUse:
    """Measure what the pooled vector alone can bring into the pictures of an embedded model.

    Args:
        model: An embedded model that reads a pooled vector.
        probe: Classifies the images.
        concept: Object that only the pooled vector names.
        tokens: Object that the tokens name.
        third: Object that the pooled vector names in the comparison.
        count: Number of pictures of each kind.
        seed: Seed of the prompts and images.
        sampling: Sampling settings. Default: 25 steps.
        progress: Receives the sampling steps of each batch.

    Raises:
        ModelError: If the model reads no pooled vector.
    """
    if model.survey.width(POOLED) is None:
        raise ModelError(f"The model '{model.name}' reads no pooled vector, so there is nothing to measure of it.")
    sampling = sampling or SamplingSettings(steps=25)
    texts = [prompt.text for prompt in world.prompts(count, seed, object=tokens)]
    pictures = [Picture(text, seed + i) for i, text in enumerate(texts)]

    def share(named: str) -> Score:
        pooled = [prompt.text for prompt in world.prompts(count, seed, object=named)]
        mixed = copy.copy(model)
        mixed.text = _MixedText(model.text, dict(zip(texts, pooled, strict=True)))
        found = [
            labels.object == concept
            for images in draw(mixed, pictures, None, sampling, progress)
            for labels in probe.classify(from_bytes(images))
        ]
        return Score.share(found)

    return PooledUse(concept, tokens, share(concept), third, share(third))
