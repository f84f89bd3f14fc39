"""Base class of the methods, and what they take besides a plan."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..files.workspace import Workspace
from ..models.latent_diffusion import LatentDiffusion
from ..patch.patch import Patch
from ..progress import Progress
from ..request.plan import Plan

__all__ = ["POOLED_LEFT", "Inputs", "Method"]

# note of a patch that leaves one of two ways of the text into a model as it is
POOLED_LEFT = "The model also reads the concept from the whole prompt's vector, which this edit does not change."


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a method takes besides a plan.

    Args:
        images: Images of a concept by its name, each ``(n, 3, H, W)`` in [-1, 1].
        workspace: Folder for results that take long to compute, and for checkpoints.
        earlier: Patch of the earlier requests of a sequence, which stays applied during training.
    """

    images: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    workspace: Workspace | None = None
    earlier: Patch | None = None

    def earlier_factors(self) -> dict[str, list[Tensor]]:
        """The factors of ``earlier``, up and down, by key."""
        return {} if self.earlier is None else {k: [f.up, f.down] for k, f in self.earlier.factors.items()}


class Method(ABC):
    """Base class of the methods.

    Attributes:
        id: Name in requests.
        title: Name in user interfaces.
        paper: Address of the paper.
        Settings: Frozen dataclass of plain values.
        presets: Settings by name; at least ``"published"`` (the authors') and ``"tuned"`` (ours).
        main: Names of at most seven settings that a short form shows; the form can hide the others.
        takes_images: Whether it can use images of the concept.
        trained: Whether it trains each request of a sequence on top of the earlier ones; the other methods are closed
            forms, which are solved for all requests together.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    Settings: ClassVar[type]
    presets: ClassVar[Mapping[str, Any]]
    main: ClassVar[tuple[str, ...]]
    takes_images: ClassVar[bool] = False
    trained: ClassVar[bool] = False

    @abstractmethod
    def fit(
        self,
        model: LatentDiffusion,
        plan: Plan,
        progress: Progress | None = None,
        inputs: Inputs | None = None,
    ) -> Patch:
        """Fit ``plan.request`` with ``plan.settings``.

        Args:
            model: The base model; it is restored bit-exactly.
            plan: The checked request.
            progress: Called with every step; may raise :class:`Cancelled`.
            inputs: Images, a work folder, and the patch of earlier requests.

        Returns:
            The patch at strength 1.
        """
