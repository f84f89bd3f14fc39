"""A fake webui: the embedded model behind the interface that the tab, the jobs and the routes use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forget_concept.core.errors import Cancelled, ModelError
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.patch.apply import PatchHandle
from forget_concept.core.patch.patch import Patch
from forget_concept.core.progress import Progress, ProgressEvent
from forget_concept.core.service.host_interface import ActivePatch, LoadedModel
from forget_concept.core.service.options import options

__all__ = ["FakeWebui"]


class FakeWebui:
    """Applies patches with hooks, uses one lock as the queue, and records its calls."""

    name, version = "fake", "1"

    def __init__(self, model: LatentDiffusion, folder: Path) -> None:
        self.diffusion = model
        self.loaded = LoadedModel("embedded.safetensors [0000]", "other", 1)
        self.folder = folder
        self.queue = threading.Lock()
        self.interrupted = threading.Event()
        self.events: list[ProgressEvent] = []
        self.opened: list[Path] = []
        self.refreshed = 0
        self.chosen: dict[str, Any] = {option.key: option.default for option in options()}
        self._applied: dict[str, tuple[PatchHandle, float]] = {}
        (folder / "lora").mkdir(parents=True, exist_ok=True)

    def model(self) -> LoadedModel:
        if self.loaded is None:
            raise ModelError("No checkpoint is loaded: choose one first.")
        return self.loaded

    def checkpoint(self) -> str:
        return "" if self.loaded is None else self.loaded.title.partition(" [")[0]

    def load(self, title: str) -> None:
        """Load a checkpoint, as a webui does: what was in the weights is gone."""
        for name in list(self._applied):
            self.remove(name)
        self.loaded = LoadedModel(title, "other", self.loaded.key + 1)

    @contextmanager
    def job(self, title: str) -> Iterator[Progress]:
        with self.queue:

            def report(event: ProgressEvent) -> None:
                self.events.append(event)
                if self.interrupted.is_set():
                    raise Cancelled

            yield report

    @contextmanager
    def latent_diffusion(self) -> Iterator[LatentDiffusion]:
        assert self.queue.locked(), "the model is used only within a job"
        yield self.diffusion

    def apply(self, name: str, patch: Patch, strength: float) -> None:
        assert not self.queue.locked(), "a patch is applied outside of a job"
        handle = patch.apply(self.diffusion.survey, strength)
        if name in self._applied:
            self._applied[name][0].remove()
        self._applied[name] = (handle, strength)

    def remove(self, name: str) -> None:
        self._applied.pop(name)[0].remove()

    def active(self) -> list[ActivePatch]:
        return [ActivePatch(name, strength, True) for name, (_, strength) in self._applied.items()]

    def lora_folder(self) -> Path:
        return self.folder / "lora"

    def data_folder(self) -> Path:
        return self.folder / "data"

    def refresh_patches(self) -> None:
        self.refreshed += 1

    def option(self, key: str) -> Any:
        return self.chosen[key]

    def open_folder(self, folder: Path) -> None:
        self.opened.append(folder)
