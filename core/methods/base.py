"""Base class of the forgetting methods and their inputs."""

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

__all__ = ["Inputs", "Method"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a person gives besides words.

    ``images``: pictures by the concept's name, each ``(n, 3, H, W)`` in [-1, 1]. ``workspace``: a folder for what takes
    long. ``earlier``: what earlier requests left, to start from.
    """

    images: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    workspace: Workspace | None = None
    earlier: Patch | None = None

    def earlier_factors(self) -> dict[str, list[Tensor]]:
        """The tensors of what earlier requests left, by key."""
        return {} if self.earlier is None else {k: [f.up, f.down] for k, f in self.earlier.factors.items()}


class Method(ABC):
    """Base of the methods of forgetting.

    ``id`` names it in requests, ``title`` and ``paper`` in interfaces. ``Settings`` is a frozen dataclass of plain
    values; ``presets`` has at least ``"published"`` (the authors') and ``"tuned"`` (ours). ``takes_images``: whether it
    can look at a person's own pictures. ``trained``: whether it starts from what earlier requests left; the others, the
    closed forms, are solved for all requests at once.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    Settings: ClassVar[type]
    presets: ClassVar[Mapping[str, Any]]
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
        """The patch at strength 1 for ``plan.request`` with ``plan.settings``."""
