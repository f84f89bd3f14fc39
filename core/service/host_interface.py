"""What the tab, the REST routes and the jobs ask of a webui: given by ``host.py`` and by ``host_forge.py``.

Nothing here, and nothing that is written against it, names the webui's own modules, so all of it can be tested without
one.
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
    """The checkpoint that is loaded: ``title`` as the webui's menu has it, ``family`` as :class:`UNetSurvey` does, and
    ``key``, which is another one as soon as another model object is in use."""

    title: str
    family: str
    key: int


@dataclass(frozen=True)
class ActivePatch:
    """A patch put into the loaded model's weights: its name, its strength and whether the weights hold it now."""

    name: str
    strength: float
    in_force: bool


class Host(Protocol):
    """A running webui. Every error is a :class:`ForgetConceptError` in words."""

    name: str

    @property
    def version(self) -> str:
        """As the webui gives it."""

    def model(self) -> LoadedModel:
        """The loaded model. Raises where there is none or none that this extension can work on."""

    def job(self, title: str) -> AbstractContextManager[Progress]:
        """Take the webui's queue lock (generation waits) and show a job in its state.

        The :data:`Progress` given moves the webui's progress, and raises :class:`Cancelled` once it is interrupted.
        """

    def latent_diffusion(self) -> AbstractContextManager[LatentDiffusion]:
        """The loaded model without any patch, to train or draw with; given back bit for bit. Only within a job."""

    def apply(self, name: str, patch: Patch, strength: float) -> None:
        """Put a patch into the loaded model's weights at once, in place of one of the same name."""

    def remove(self, name: str) -> None:
        """Take a patch out again; the weights are then what they were, bit for bit."""

    def active(self) -> list[ActivePatch]:
        """What was applied to the model object in use, in that order."""

    def lora_folder(self) -> Path:
        """Where patches are saved, so that ``<lora:name:1>`` finds them."""

    def data_folder(self) -> Path:
        """This extension's own folder for settings, reports and what takes long to make."""

    def refresh_patches(self) -> None:
        """Have the webui look at its Lora folder again."""

    def option(self, key: str) -> Any:
        """What a person chose on the settings page, by the key of one of ``settings.options()``."""

    def open_folder(self, folder: Path) -> None:
        """Show a folder in the file manager of the webui's own machine; raises where that is switched off."""
