"""One webui's jobs, patches and reports in one place, which the tab and the REST routes share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ForgetConceptError, PatchError, RequestError
from .errors import NotFoundError
from .evaluate_job import EvaluateJob, Reports
from .forget_job import ForgetJob, check_strength
from .host_interface import ActivePatch, Host
from .jobs import Job, Jobs
from .options import Settings
from .patch_library import Entry, PatchLibrary

__all__ = ["PatchStore", "patch_store_of"]


class PatchStore:
    """What can be asked of this extension; every error is a :class:`ForgetConceptError` in words."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.jobs = Jobs(host)
        self.library = PatchLibrary(host.lora_folder)
        self.reports = Reports(host)

    @property
    def settings(self) -> Settings:
        return Settings.of(self.host)

    # -- jobs ----------------------------------------------------------------------------------------------------

    def forget(self, asked: ForgetJob, done: Callable[[], None] = lambda: None) -> Job:
        """Begin to forget. ``done`` is called once the job no longer needs its pictures. Raises in words."""
        self.jobs.check_free()
        asked.check(self.host, self.library)

        def work(told: Any) -> Any:
            try:
                return asked.work(self.host, told)
            finally:
                done()

        return self.jobs.start("forget", asked.title, work, lambda made: asked.finish(self.host, self.library, made))

    def evaluate(self, asked: EvaluateJob) -> Job:
        """Begin to measure a patch. Raises in words."""
        self.jobs.check_free()
        asked.check(self.host, self.library, self.reports)
        return self.jobs.start(
            "evaluate",
            asked.title,
            lambda told: asked.work(self.host, self.library, told),
            lambda report: asked.finish(self.reports, report),
        )

    # -- patches -------------------------------------------------------------------------------------------------

    def active(self) -> list[ActivePatch]:
        """What is in the loaded model's weights."""
        return self.host.active()

    def apply(self, name: str, strength: float) -> None:
        """Put a patch into the loaded model, in place of itself at another strength."""
        check_strength(strength)
        self.jobs.check_free()  # else this would wait, without a word, for as long as the job takes
        self._fitting(name)
        self.host.apply(name, self.library.load(name), strength)

    def remove(self, name: str) -> None:
        """Take a patch out of the loaded model."""
        if name not in [one.name for one in self.active()]:
            raise NotFoundError(f"The patch '{name[:120]}' is not in the loaded model.")
        self.jobs.check_free()
        self.host.remove(name)

    def rename(self, name: str, new: str) -> Entry:
        self.check_out(name, "renamed")
        entry = self.library.rename(name, new)
        self.host.refresh_patches()
        return entry

    def delete(self, name: str) -> None:
        self.check_out(name, "deleted")
        self.library.delete(name)
        self.host.refresh_patches()

    def combine(self, parts: Sequence[tuple[str, float]], name: str, max_rank: int | None) -> tuple[Entry, str]:
        """Make one patch of several; the entry and words about it."""
        settings = self.settings
        found = self.library.combine(parts, name, settings.folder, max_rank, settings.precision)
        self.host.refresh_patches()
        return found

    def _fitting(self, name: str) -> None:
        entry, model = self.library.find(name), self.host.model()
        if "other" not in (entry.family, model.family) and entry.family != model.family:
            raise PatchError(
                f"The patch '{name}' is for {entry.family.upper()} models, and '{model.title}' is of the family "
                f"{model.family.upper()}: load a checkpoint of its kind."
            )

    def check_out(self, name: str, done: str) -> None:
        """Raise in words, while a patch is in the loaded model, that it cannot be ``done`` with so."""
        self.library.find(name)
        if name in self._names_in_use():
            raise RequestError(f"'{name}' is in the loaded model: remove it there before it is {done}.")

    def _names_in_use(self) -> list[str]:
        try:
            return [one.name for one in self.active()]
        except ForgetConceptError:  # there is no model, so nothing is in one
            return []


_DESKS: dict[Host, PatchStore] = {}
_LOCK = threading.Lock()


def patch_store_of(host: Host) -> PatchStore:
    """The one desk of a webui: the tab and the routes see the same jobs."""
    with _LOCK:
        if host not in _DESKS:
            _DESKS[host] = PatchStore(host)
        return _DESKS[host]
