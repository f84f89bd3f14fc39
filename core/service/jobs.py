"""Long work, one piece at a time, in a thread of its own; what is known of it can be asked for at any time.

A job belongs to the webui, not to the page that started it: a page that is loaded again finds it where it is.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..errors import Cancelled, ForgetConceptError, ModelError
from ..progress import Progress, ProgressEvent
from .errors import BusyError, NotFoundError
from .host_interface import Host, LoadedModel

__all__ = ["Job", "Jobs", "Outcome", "Pair"]

State = Literal["queued", "running", "done", "failed", "cancelled"]
MAX_FINISHED = 20
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pair:
    """The same prompt and seed without and with a patch: two pictures ``(3, H, W)`` uint8."""

    prompt: str
    seed: int
    before: Tensor
    after: Tensor
    about: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a job came to: ``words`` to read, ``data`` as JSON, pictures, and a file to open."""

    words: str
    data: Mapping[str, Any]
    pairs: tuple[Pair, ...] = ()
    file: Path | None = None


@dataclass(frozen=True)
class Job:
    """A job as it stands: ``step`` of ``total`` of the part that ``message`` names, and times in seconds.

    ``left`` is the time that this part will still take, ``None`` while nothing is known of it. ``error`` says in words
    why it failed.
    """

    id: str
    kind: str
    title: str
    state: State = "queued"
    step: int = 0
    total: int = 0
    loss: float | None = None
    message: str = ""
    seconds: float = 0.0
    left: float | None = None
    stopping: bool = False
    error: str = ""
    outcome: Outcome | None = None

    @property
    def over(self) -> bool:
        return self.state not in ("queued", "running")

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, without the pictures."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("outcome", "left")}
        return plain | {
            "seconds_left": self.left,
            "words": "" if self.outcome is None else self.outcome.words,
            "pictures": 0 if self.outcome is None else len(self.outcome.pairs),
            "result": None if self.outcome is None else dict(self.outcome.data),
        }


@dataclass
class _Kept:
    """A job and what it is timed by."""

    job: Job
    stop: threading.Event = field(default_factory=threading.Event)
    began: float | None = None
    part: tuple[str, int, float] = ("", 0, 0.0)  # its message, and the step and time that it began with


class Jobs:
    """The jobs of one webui; the last few stay to be asked about."""

    def __init__(self, host: Host, clock: Callable[[], float] = time.monotonic) -> None:
        self._host, self._clock = host, clock
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}

    # -- asking --------------------------------------------------------------------------------------------------

    def all(self) -> list[Job]:
        """Every job that is still known, the newest last."""
        with self._lock:
            return [self._timed(kept) for kept in self._kept.values()]

    def latest(self, kind: str | None = None) -> Job | None:
        """The newest job (of a kind)."""
        found = [job for job in self.all() if kind is None or job.kind == kind]
        return found[-1] if found else None

    def get(self, job_id: str) -> Job:
        """Raises :class:`NotFoundError` where there is none of this id."""
        with self._lock:
            if job_id not in self._kept:
                raise NotFoundError(
                    f"There is no job '{job_id[:40]}': the last {MAX_FINISHED} are kept until the webui ends."
                )
            return self._timed(self._kept[job_id])

    def check_free(self) -> None:
        """Raise :class:`BusyError`, in words, while a job is under way."""
        with self._lock:
            self._check_free()

    # -- doing ---------------------------------------------------------------------------------------------------

    def start(self, kind: str, title: str, work: Callable[[Progress], T], finish: Callable[[T], Outcome]) -> Job:
        """Begin a job: ``work`` while the webui's queue is held, then ``finish`` with what came of it.

        Nothing is to be written before ``finish``: it is not called where the job was cancelled or failed, or where
        another checkpoint was loaded meanwhile. Raises :class:`BusyError`.
        """
        with self._lock:
            self._check_free()
            kept = _Kept(Job(secrets.token_hex(8), kind, title, message="waiting for the webui"))
            begun = kept.job
            self._kept[begun.id] = kept
            for old in list(self._kept)[:-MAX_FINISHED]:
                del self._kept[old]
        threading.Thread(
            target=self._run, args=(kept, work, finish), name=f"forget-concept {kind}", daemon=True
        ).start()
        return begun

    def cancel(self, job_id: str) -> Job:
        """Ask a job to end at its next step; one that is over stays as it is. Raises as :meth:`get`."""
        job = self.get(job_id)
        if not job.over:
            with self._lock:
                kept = self._kept[job_id]
                kept.stop.set()
                if not kept.job.over:
                    kept.job = dataclasses.replace(kept.job, stopping=True)
        return self.get(job_id)

    # -- inside --------------------------------------------------------------------------------------------------

    def _check_free(self) -> None:
        for kept in self._kept.values():
            if not kept.job.over:
                raise BusyError(
                    f"Another job is under way ({kept.job.title}): wait until it is done, or interrupt it first."
                )

    def _timed(self, kept: _Kept) -> Job:
        """With the lock held: the job with its times as of now."""
        job = kept.job
        if job.over or kept.began is None:
            return job
        now = self._clock()
        message, first, since = kept.part
        done = job.step - first
        left = None
        if message == job.message and done > 0 and job.step < job.total:
            left = max((now - since) / done * (job.total - job.step), 0.0)
        return dataclasses.replace(job, seconds=now - kept.began, left=left)

    def _change(self, kept: _Kept, **changes: Any) -> None:
        with self._lock:
            kept.job = dataclasses.replace(self._timed(kept), **changes)

    def _end(self, kept: _Kept, state: State, **changes: Any) -> None:
        self._change(kept, state=state, message="", left=None, stopping=False, **changes)

    def _run(self, kept: _Kept, work: Callable[[Progress], T], finish: Callable[[T], Outcome]) -> None:
        try:
            with self._host.job(kept.job.title) as shown:
                model = self._host.model()
                with self._lock:
                    kept.began = self._clock()
                    kept.job = dataclasses.replace(kept.job, state="running", message="starting")
                made = work(self._told(kept, shown, model))
                self._check_same(model)
            self._change(kept, message="saving")
            outcome = finish(made)
            self._end(kept, "done", outcome=outcome)
        except Cancelled:
            self._end(kept, "cancelled")
        except ForgetConceptError as error:
            self._end(kept, "failed", error=str(error))
        except torch.cuda.OutOfMemoryError:
            words = "The graphics card has too little memory for this: close other programs, or choose a smaller batch."
            self._end(kept, "failed", error=words)
        except Exception as error:  # a fault of this program: the person is told, the log has the rest
            log.exception("The job '%s' broke off.", kept.job.title)
            words = (
                f"This broke off by a fault of the program ({type(error).__name__}: {error}). The console says more."
            )
            self._end(kept, "failed", error=words)

    def _told(self, kept: _Kept, shown: Progress, model: LoadedModel) -> Progress:
        looked = self._clock()

        def told(event: ProgressEvent) -> None:
            nonlocal looked
            if kept.stop.is_set():
                raise Cancelled
            shown(event)
            now = self._clock()
            with self._lock:
                if event.message != kept.part[0] or event.step < kept.part[1]:
                    kept.part = (event.message, event.step, now)
                kept.job = dataclasses.replace(
                    kept.job, step=event.step, total=event.total, loss=event.loss, message=event.message
                )
            if now - looked > 1:
                looked = now
                self._check_same(model)

        if kept.stop.is_set():
            raise Cancelled
        return told

    def _check_same(self, model: LoadedModel) -> None:
        now = self._host.model()
        if now.key != model.key:
            raise ModelError(
                f"The checkpoint was changed from '{model.title}' to '{now.title}' while this ran, so that nothing was "
                "saved: load the one that is meant, and start again."
            )
