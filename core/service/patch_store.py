"""The jobs, patches and reports of one host in one place, which a page and a REST interface share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import ForgetConceptError, PatchError, RequestError
from ..progress import Progress
from ..request.themes import user_theme_folder
from .applied import AppliedPatches, DroppedPatch
from .errors import NotFoundError
from .evaluate_job import EvaluateJob, Reports
from .forget_job import ForgetJob, ForgetResult, check_strength
from .host_interface import ActivePatch, Host
from .jobs import Job, Jobs, Outcome
from .options import Settings
from .patch_library import Entry, PatchLibrary

__all__ = ["PatchStore", "patch_store_of"]


class PatchStore:
    """The operations of a front: start jobs, and apply, remove, rename, delete and combine patches.

    Every error is a :class:`ForgetConceptError` with a message for the user. Nothing here knows the front.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.jobs = Jobs(host)
        self.library = PatchLibrary(host.lora_folder)
        self.reports = Reports(host)
        self._applied = AppliedPatches()

    @property
    def settings(self) -> Settings:
        """The options on the host's settings page, as they are now."""
        return Settings.of(self.host)

    @property
    def theme_folders(self) -> list[Path]:
        """Folders of the user's own themes: the host's, then the one that the command line reads."""
        return [self.host.data_folder() / "themes", user_theme_folder()]

    # -- jobs ----------------------------------------------------------------------------------------------------

    def forget(self, job: ForgetJob, done: Callable[[], None] = lambda: None) -> Job:
        """Check and start a job that fits a patch; ``done`` is called once it no longer needs its reference images."""
        self.jobs.check_free()
        job.check(self.host, self.library)

        def work(progress: Progress) -> ForgetResult:
            try:
                return job.work(self.host, progress)
            finally:
                done()

        def finish(result: ForgetResult) -> Outcome:
            outcome = job.finish(self.host, self.library, result)
            if outcome.data["applied"]:
                self._applied.put(self.host.checkpoint(), outcome.data["name"], float(job.apply or 0.0))
            return outcome

        return self.jobs.start("forget", job.title, work, finish)

    def evaluate(self, job: EvaluateJob) -> Job:
        """Check and start a job that evaluates a patch."""
        self.jobs.check_free()
        job.check(self.host, self.library, self.reports)
        return self.jobs.start(
            "evaluate",
            job.title,
            lambda progress: job.work(self.host, self.library, progress),
            lambda report: job.finish(self.reports, report),
        )

    # -- patches -------------------------------------------------------------------------------------------------

    def active(self) -> list[ActivePatch]:
        """The patches applied to the loaded model."""
        return self.host.active()

    def apply(self, name: str, strength: float) -> None:
        """Apply a patch to the loaded model, or change its strength there."""
        check_strength(strength)
        self.jobs.check_free()  # else this would wait silently for as long as the job takes
        self._put(name, strength)

    def _put(self, name: str, strength: float) -> None:
        self._check_family(name)
        self.host.apply(name, self.library.load(name), strength)
        self._applied.put(self.host.checkpoint(), name, strength)

    def remove(self, name: str) -> None:
        """Remove a patch from the loaded model, or strike off one that was dropped from it."""
        if name not in [one.name for one in self.active()]:
            if dropped := [one for one in self.dropped() if one.name == name]:
                self._applied.dismiss(dropped)
                return
            raise NotFoundError(f"The patch '{name[:120]}' is not in the loaded model.")
        self.jobs.check_free()
        self.host.remove(name)
        self._applied.take(self.host.checkpoint(), name)

    # -- patches that a checkpoint lost when it was loaded again ---------------------------------------------------

    def dropped(self) -> list[DroppedPatch]:
        """The patches that the user applied and did not remove, and that are not in the current checkpoint."""
        return self._applied.dropped(self.host.checkpoint(), self.active())

    def apply_again(self) -> list[DroppedPatch]:
        """Apply every dropped patch to the loaded model at its strength, and return them.

        Raises:
            ForgetConceptError: One cannot be applied, or a job is running; those before it are applied.
        """
        self.jobs.check_free()
        dropped = self.dropped()
        for one in dropped:
            self._restore(one)
        return dropped

    def apply_again_for_picture(self) -> list[DroppedPatch]:
        """Like :meth:`apply_again`, of the current checkpoint's own patches, for a host that is about to draw.

        The host holds its queue for this thread, so that a job that waits for the queue does not matter.
        """
        dropped = [one for one in self.dropped() if one.same]
        for one in dropped:
            self._restore(one)
        return dropped

    def dismiss_dropped(self) -> list[DroppedPatch]:
        """Strike off every dropped patch, and return them; the loaded model stays as it is."""
        dropped = self.dropped()
        self._applied.dismiss(dropped)
        return dropped

    def _restore(self, dropped: DroppedPatch) -> None:
        # something else overwrote its weights: the host still lists it
        if dropped.name in [one.name for one in self.active()]:
            self.host.remove(dropped.name)
        self._put(dropped.name, dropped.strength)

    # -- the library -----------------------------------------------------------------------------------------------

    def rename(self, name: str, new: str) -> Entry:
        """Rename a patch in the library; refused while it is applied."""
        self.check_not_applied(name, "rename")
        entry = self.library.rename(name, new)
        self._applied.rename(name, entry.name)
        self.host.refresh_patches()
        return entry

    def delete(self, name: str) -> None:
        """Delete a patch from the library; refused while it is applied."""
        self.check_not_applied(name, "delete")
        self.library.delete(name)
        self._applied.rename(name, None)
        self.host.refresh_patches()

    def combine(self, parts: Sequence[tuple[str, float]], name: str, max_rank: int | None) -> tuple[Entry, str]:
        """Combine several patches, each at a strength, into a new one; returns its entry and a summary."""
        settings = self.settings
        combined = self.library.combine(parts, name, settings.folder, max_rank, settings.precision)
        self.host.refresh_patches()
        return combined

    def _check_family(self, name: str) -> None:
        entry, model = self.library.find(name), self.host.model()
        if "other" not in (entry.family, model.family) and entry.family != model.family:
            raise PatchError(
                f"The patch '{name}' is for {entry.family.upper()} models, and '{model.title}' is of the family "
                f"{model.family.upper()}: load a checkpoint of the same family."
            )

    def check_not_applied(self, name: str, action: str) -> None:
        """Raise :class:`RequestError`, naming the ``action``, where the patch is applied to the loaded model."""
        self.library.find(name)
        if name in self._active_names():
            raise RequestError(f"'{name}' is in the loaded model: remove it there first, then {action} it.")

    def _active_names(self) -> list[str]:
        try:
            return [one.name for one in self.active()]
        except ForgetConceptError:  # no model is loaded, so no patch is applied
            return []


_STORES: dict[Host, PatchStore] = {}
_LOCK = threading.Lock()


def patch_store_of(host: Host) -> PatchStore:
    """The one patch store of a host: its page and its REST interface see the same jobs."""
    with _LOCK:
        if host not in _STORES:
            _STORES[host] = PatchStore(host)
        return _STORES[host]
