"""Judges classify images by category: the probe for the embedded model, zero-shot CLIP for any other model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import RequestError
from ..mini.vocabulary import NONE
from ..mini.world import LABELS, Labels
from ..request.concept import KINDS

if TYPE_CHECKING:
    from .drawing import ImageClassifier
    from .metrics import ImageText

__all__ = ["NOTHING", "TEMPLATES", "ClipJudge", "Judge", "WorldJudge"]

# prompt ensembling: several templates per class (Radford et al. 2021, section 3.1.4)
TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": ("a photo of a {}", "a picture of a {}", "a drawing of a {}", "a painting of a {}"),
    "style": ("a picture in the style of {}", "a painting in the style of {}", "a {} artwork", "art by {}"),
    "identity": ("a photo of {}", "a portrait of {}", "a picture of {}", "a painting of {}"),
}
# the "none" class of each category
NOTHING: dict[str, tuple[str, ...]] = {
    "object": ("a photo", "a picture of something else", "an empty background"),
    "style": ("a photo", "an ordinary photograph", "a picture in no particular style"),
    "identity": ("a photo of a person", "a portrait of somebody unknown", "a picture without people"),
}


class Judge(Protocol):
    """Classifies images ``(n, 3, H, W)`` in [-1, 1], like an :class:`ImageClassifier`, and knows its classes.

    ``names`` are the classes by category, without *none*; ``description`` names the judge in reports.
    """

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]: ...

    @property
    def description(self) -> str: ...

    def classify(self, images: Tensor) -> list[Labels]:
        """Return one :class:`Labels` per image."""
        ...


class WorldJudge:
    """The embedded model's probe as a judge."""

    description = "the embedded model's probe"

    def __init__(self, probe: ImageClassifier) -> None:
        self.probe = probe
        self.names = {category: tuple(n for n in names if n != NONE) for category, names in LABELS.items()}

    def classify(self, images: Tensor) -> list[Labels]:
        return self.probe.classify(images)


class ClipJudge:
    """Zero-shot classification with CLIP: per category, the name with the most similar text embedding, or *none*.

    A class embedding is the mean of the normalized embeddings of its prompts. In a category with few names, an image of
    something else may still be most similar to one of them, so compare every score with the unedited model's.

    Args:
        encoder: :class:`OpenClip`, :class:`TransformersClip` or another :class:`ImageText`.
        names: Class names by category.
        templates: Prompt templates by category, each with one ``{}``.
        nothing: Phrases of the *none* class by category.
        batch: Images per batch.

    Raises:
        RequestError: If a category is unknown, there are no names, or ``batch`` is below 1.

    Reference: Radford et al. 2021, arXiv 2103.00020, section 3.1.4.
    """

    def __init__(
        self,
        encoder: ImageText,
        names: Mapping[str, Sequence[str]],
        templates: Mapping[str, Sequence[str]] = TEMPLATES,
        nothing: Mapping[str, Sequence[str]] = NOTHING,
        batch: int = 64,
    ) -> None:
        if unknown := [category for category in names if category not in KINDS]:
            raise RequestError(f"The category '{unknown[0]}' is not known: choose from {', '.join(KINDS)}.")
        if batch < 1:
            raise RequestError(f"The batch must be at least 1, not {batch}.")
        self.names = {category: tuple(dict.fromkeys(found)) for category, found in names.items() if found}
        if not self.names:
            raise RequestError("There are no classes to distinguish: use a benchmark that names at least one concept.")
        self.encoder, self.batch = encoder, batch
        self.description = f"zero-shot, {encoder.name}"
        self._texts = {
            category: torch.stack(
                [self._mean([t.format(name) for t in templates[category]]) for name in found]
                + [self._mean(nothing[category])]
            )
            for category, found in self.names.items()
        }

    def _mean(self, phrases: Sequence[str]) -> Tensor:
        return normalize(normalize(self.encoder.text_features(phrases).double(), dim=1).mean(0), dim=0)

    @torch.no_grad()
    def classify(self, images: Tensor) -> list[Labels]:
        found: list[Labels] = []
        for part in images.split(self.batch):
            features = normalize(self.encoder.image_features(part).double(), dim=1)
            # on a tie the lower index wins, so a name is preferred to "none"
            winners = {category: (features @ texts.T).argmax(1).tolist() for category, texts in self._texts.items()}
            for row in range(len(part)):
                labels = {category: (*self.names[category], NONE)[winner[row]] for category, winner in winners.items()}
                found.append(Labels(**labels))
        return found
