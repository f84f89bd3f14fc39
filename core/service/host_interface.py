"""What jobs and fronts need from a host with a loaded model, such as a webui; each host implements :class:`Host`.

Nothing here names a host's own modules, so that everything written against it can be tested without one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..models.latent_diffusion import LatentDiffusion
from ..patch.patch import Patch
from ..progress import Progress

__all__ = ["ActivePatch", "Host", "LoadedModel"]


@dataclass(frozen=True)
class LoadedModel:
    """The checkpoint that is loaded.

    Attributes:
        title: Its name in the host's menu.
        family: Its family, as :class:`UNetSurvey` names it.
        key: Identifies the model object; changes as soon as another one is in use.
    """

    title: str
    family: str
    key: int


@dataclass(frozen=True)
class ActivePatch:
    """A patch that was applied to the loaded model.

    Attributes:
        name: The patch's name in the library.
        strength: The strength it was applied with.
        in_force: Whether the weights contain it now; something else may have overwritten them.
    """

    name: str
    strength: float
    in_force: bool


class Host(Protocol):
    """A running host with one loaded model; every error is a :class:`ForgetConceptError` for the user."""

    name: str

    @property
    def version(self) -> str:
        """The host's own version string."""

    def model(self) -> LoadedModel:
        """The loaded model. Raises :class:`ModelError` where there is none or it is not supported."""

    def checkpoint(self) -> str:
        """The file name of the checkpoint that the next picture uses, without loading it; empty where there is none."""

    def job(self, title: str) -> AbstractContextManager[Progress]:
        """Hold the host's queue, so that image generation waits, and show a job in its state.

        The callback reports progress to the host and raises :class:`Cancelled` once the user interrupts.
        """

    def latent_diffusion(self) -> AbstractContextManager[LatentDiffusion]:
        """The loaded model without any patch, for training and drawing; restored bit-exactly. Only within a job."""

    def apply(self, name: str, patch: Patch, strength: float) -> None:
        """Write a patch into the loaded model's weights; replaces an active patch of the same name."""

    def remove(self, name: str) -> None:
        """Remove an active patch; the weights are bit-identical to what they would be without it."""

    def active(self) -> list[ActivePatch]:
        """The patches applied to the model that the next picture uses, in the order of their application."""

    def lora_folder(self) -> Path:
        """Where patches are saved, so that the host's own LoRA loader finds them."""

    def data_folder(self) -> Path:
        """This package's own folder in the host: remembered forms, reports and cached work."""

    def refresh_patches(self) -> None:
        """Make the host read its LoRA folder again."""

    def option(self, key: str) -> Any:
        """The value of an option on the host's settings page, by the key of one of :func:`options.options`."""

    def open_folder(self, folder: Path) -> None:
        """Show a folder in the file manager of the host's machine. Raises where the host disables that."""
