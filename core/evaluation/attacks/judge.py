"""Success criterion of an attack: whether an image shows the concept."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from ...files.workspace import key_of
from ..drawing import ImageClassifier
from ..questions import find_concept

__all__ = ["ProbeJudge", "SuccessJudge"]


class SuccessJudge(Protocol):
    """Decides whether images show the concept."""

    @property
    def description(self) -> str:
        """Identifies the judge in the keys of cached verdicts."""
        ...

    def shows(self, images: Tensor) -> list[bool]:
        """Return whether each of ``images`` ``(n, 3, H, W)`` in [-1, 1] shows the concept."""
        ...


class ProbeJudge:
    """The embedded model's probe as a success criterion for one concept.

    Args:
        probe: The probe.
        concept: Name of the concept.

    Raises:
        RequestError: If the probe does not know the concept.
    """

    def __init__(self, probe: ImageClassifier, concept: str) -> None:
        self.probe = probe
        self.concept, self.category = find_concept(concept)
        weights = key_of(dict(probe.state_dict())) if isinstance(probe, nn.Module) else type(probe).__name__
        self.description = f"probe {weights}: {self.category} {self.concept}"

    def shows(self, images: Tensor) -> list[bool]:
        return [getattr(labels, self.category) == self.concept for labels in self.probe.classify(images)]
