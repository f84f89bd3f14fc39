"""Who says that an attack succeeded: whether a picture shows the concept."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from ...files.workspace import key_of
from ..drawing import ImageClassifier
from ..scores import find_concept

__all__ = ["ProbeJudge", "SuccessJudge"]


class SuccessJudge(Protocol):
    """Finds the concept in pictures or not. ``about`` tells judges apart whose verdicts are kept."""

    @property
    def description(self) -> str: ...

    def shows(self, images: Tensor) -> list[bool]:
        """Whether each of ``images`` ``(n, 3, H, W)`` in [-1, 1] shows the concept."""


class ProbeJudge:
    """The embedded model's probe, asked for one concept of its world."""

    def __init__(self, probe: ImageClassifier, concept: str) -> None:
        """Raises :class:`RequestError` for a concept that the probe does not know."""
        self.probe = probe
        self.concept, self.category = find_concept(concept)
        weights = key_of(dict(probe.state_dict())) if isinstance(probe, nn.Module) else type(probe).__name__
        self.description = f"probe {weights}: {self.category} {self.concept}"

    def shows(self, images: Tensor) -> list[bool]:
        return [getattr(labels, self.category) == self.concept for labels in self.probe.classify(images)]
