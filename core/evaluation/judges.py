"""Judges: what a picture shows, one name in each category. The embedded model has its probe, any other model CLIP."""

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

# several wordings make one class (Radford et al. 2021, section 3.1.4)
TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": ("a photo of a {}", "a picture of a {}", "a drawing of a {}", "a painting of a {}"),
    "style": ("a picture in the style of {}", "a painting in the style of {}", "a {} artwork", "art by {}"),
    "identity": ("a photo of {}", "a portrait of {}", "a picture of {}", "a painting of {}"),
}
# what a category's names compete with: a picture that shows none of them
NOTHING: dict[str, tuple[str, ...]] = {
    "object": ("a photo", "a picture of something else", "an empty background"),
    "style": ("a photo", "an ordinary photograph", "a picture in no particular style"),
    "identity": ("a photo of a person", "a portrait of somebody unknown", "a picture without people"),
}


class Judge(Protocol):
    """Says what it sees in pictures ``(n, 3, H, W)`` in [-1, 1]: one :class:`Labels` each, as a probe does.

    ``names`` are those it can tell apart, by category (*none* not among them); ``about`` says in words who judges.
    """

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]: ...

    @property
    def description(self) -> str: ...

    def classify(self, images: Tensor) -> list[Labels]: ...


class WorldJudge:
    """The embedded model's probe."""

    description = "the embedded model's probe"

    def __init__(self, probe: ImageClassifier) -> None:
        self.probe = probe
        self.names = {category: tuple(n for n in names if n != NONE) for category, names in LABELS.items()}

    def classify(self, images: Tensor) -> list[Labels]:
        return self.probe.classify(images)


class ClipJudge:
    """Zero-shot classification by a CLIP: in each category the name whose text is nearest to the picture, or *none*.

    A name's vector is the mean of the unit vectors of its ``templates``, *none*'s that of the phrases of ``nothing``
    (Radford et al. 2021, arXiv 2103.00020, section 3.1.4). Where a category has few names, a picture of something else
    may still be nearest to one of them: hold every figure against the unedited model's. ``encoder`` is
    :class:`OpenClip` or anything of its form. Raises :class:`RequestError` for unknown categories and where
    there is no name at all.
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
            raise RequestError(f"The category '{unknown[0]}' is not known: choose among {', '.join(KINDS)}.")
        if batch < 1:
            raise RequestError(f"The batch must be at least 1, not {batch}.")
        self.names = {category: tuple(dict.fromkeys(found)) for category, found in names.items() if found}
        if not self.names:
            raise RequestError("There is nothing to tell apart: the benchmark names no concept.")
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
            seen = normalize(self.encoder.image_features(part).double(), dim=1)
            # stable on a tie: a lower place wins, so a name does before "none"
            winners = {category: (seen @ texts.T).argmax(1).tolist() for category, texts in self._texts.items()}
            for row in range(len(part)):
                labels = {category: (*self.names[category], NONE)[winner[row]] for category, winner in winners.items()}
                found.append(Labels(**labels))
        return found
