"""Jobs: long work in a background thread, one at a time, whose state can be read at any time.

A job belongs to the host, not to the page that started it: a page that is reloaded finds the job still running.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..errors import Cancelled, ForgetConceptError, ModelError
from ..progress import Progress, ProgressEvent
from .errors import BusyError, NotFoundError
from .host_interface import Host, LoadedModel
from .progress_text import TimeLeft

__all__ = ["Job", "Jobs", "Outcome", "Pair"]

State = Literal["queued", "running", "done", "failed", "cancelled"]
MAX_FINISHED = 20
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pair:
    """The same prompt and seed without and with a patch: two uint8 pictures ``(3, H, W)``."""

    prompt: str
    seed: int
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Outcome:
    """The result of a job.

    Attributes:
        summary: For the user to read.
        data: As JSON values.
        pairs: Pictures before and after.
    """

    summary: str
    data: Mapping[str, Any]
    pairs: tuple[Pair, ...] = ()


@dataclass(frozen=True)
class Job:
    """A snapshot of a job.

    Attributes:
        step: Steps done, of ``total``, of the part of the work that ``message`` names.
        loss: Of the last training step; ``None`` while nothing is trained.
        seconds: How long the job has been running.
        left: Estimated seconds until this part is done; ``None`` while unknown.
        stopping: Whether the job was cancelled and has not ended yet.
        error: Why the job failed, in one sentence.
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
            "words": "" if self.outcome is None else self.outcome.summary,
            "pictures": 0 if self.outcome is None else len(self.outcome.pairs),
            "result": None if self.outcome is None else dict(self.outcome.data),
        }


@dataclass
class _JobRecord:
    """A job's last snapshot, and what its thread and its callers share."""

    job: Job
    time_left: TimeLeft
    stop: threading.Event = field(default_factory=threading.Event)
    began: float | None = None


class Jobs:
    """The jobs of one host: at most one is running, and the last :data:`MAX_FINISHED` can still be read."""

    def __init__(self, host: Host, clock: Callable[[], float] = time.monotonic) -> None:
        self._host, self._clock = host, clock
        self._lock = threading.Lock()
        self._records: dict[str, _JobRecord] = {}

    # -- reading -------------------------------------------------------------------------------------------------

    def all(self) -> list[Job]:
        """Every job that can still be read, the newest last."""
        with self._lock:
            return [self._timed(record) for record in self._records.values()]

    def latest(self, kind: str | None = None) -> Job | None:
        """The newest job, of ``kind`` where one is given."""
        found = [job for job in self.all() if kind is None or job.kind == kind]
        return found[-1] if found else None

    def get(self, job_id: str) -> Job:
        """The job with this id. Raises :class:`NotFoundError` where there is none."""
        with self._lock:
            if job_id not in self._records:
                raise NotFoundError(
                    f"There is no job '{job_id[:40]}': the last {MAX_FINISHED} can be read until the host is restarted."
                )
            return self._timed(self._records[job_id])

    def check_free(self) -> None:
        """Raise :class:`BusyError` while a job is running."""
        with self._lock:
            self._check_free()

    # -- running -------------------------------------------------------------------------------------------------

    def start(self, kind: str, title: str, work: Callable[[Progress], T], finish: Callable[[T], Outcome]) -> Job:
        """Start a job: ``work`` while the host's queue is held, then ``finish`` with its result.

        Only ``finish`` may write files: it is not called where the job was cancelled or failed, or where another
        checkpoint was loaded meanwhile.

        Raises:
            BusyError: While another job is running.
        """
        with self._lock:
            self._check_free()
            record = _JobRecord(
                Job(secrets.token_hex(8), kind, title, message="waiting for the queue"), TimeLeft(self._clock)
            )
            started = record.job
            self._records[started.id] = record
            for old in list(self._records)[:-MAX_FINISHED]:
                del self._records[old]
        threading.Thread(
            target=self._run, args=(record, work, finish), name=f"forget-concept {kind}", daemon=True
        ).start()
        return started

    def cancel(self, job_id: str) -> Job:
        """Cancel a job at its next step; one that is over stays as it is. Raises as :meth:`get`."""
        job = self.get(job_id)
        if not job.over:
            with self._lock:
                record = self._records[job_id]
                record.stop.set()
                if not record.job.over:
                    record.job = dataclasses.replace(record.job, stopping=True)
        return self.get(job_id)

    # -- inside --------------------------------------------------------------------------------------------------

    def _check_free(self) -> None:
        for record in self._records.values():
            if not record.job.over:
                raise BusyError(
                    f"Another job is running ({record.job.title}): wait until it is done, or interrupt it first."
                )

    def _timed(self, record: _JobRecord) -> Job:
        """The job with its times as of now; the lock is held."""
        job = record.job
        if job.over or record.began is None:
            return job
        return dataclasses.replace(job, seconds=self._clock() - record.began, left=record.time_left.seconds())

    def _change(self, record: _JobRecord, **changes: Any) -> None:
        with self._lock:
            record.job = dataclasses.replace(self._timed(record), **changes)

    def _end(self, record: _JobRecord, state: State, **changes: Any) -> None:
        self._change(record, state=state, message="", left=None, stopping=False, **changes)

    def _run(self, record: _JobRecord, work: Callable[[Progress], T], finish: Callable[[T], Outcome]) -> None:
        try:
            with self._host.job(record.job.title) as host_progress:
                model = self._host.model()
                with self._lock:
                    record.began = self._clock()
                    record.job = dataclasses.replace(record.job, state="running", message="starting")
                made = work(self._progress(record, host_progress, model))
                self._check_same(model)
            record.time_left = TimeLeft(self._clock)
            self._change(record, message="saving")
            outcome = finish(made)
            self._end(record, "done", outcome=outcome)
        except Cancelled:
            self._end(record, "cancelled")
        except ForgetConceptError as error:
            self._end(record, "failed", error=str(error))
        except torch.cuda.OutOfMemoryError:
            message = "The graphics card has too little memory: close other programs, or choose a smaller batch."
            self._end(record, "failed", error=message)
        except Exception as error:  # a fault of this program: the user gets one sentence, the log the traceback
            log.exception("The job '%s' failed.", record.job.title)
            message = f"The job failed by a fault of the program ({type(error).__name__}: {error}): see the console."
            self._end(record, "failed", error=message)

    def _progress(self, record: _JobRecord, host_progress: Progress, model: LoadedModel) -> Progress:
        """Progress to the job's record and to the host; cancels, and notices another checkpoint within a second."""
        checked = self._clock()

        def progress(event: ProgressEvent) -> None:
            nonlocal checked
            if record.stop.is_set():
                raise Cancelled
            host_progress(event)
            with self._lock:
                record.time_left.update(event)
                record.job = dataclasses.replace(
                    record.job, step=event.step, total=event.total, loss=event.loss, message=event.message
                )
            if (now := self._clock()) - checked > 1:
                checked = now
                self._check_same(model)

        if record.stop.is_set():
            raise Cancelled
        return progress

    def _check_same(self, model: LoadedModel) -> None:
        now = self._host.model()
        if now.key != model.key:
            raise ModelError(
                f"The checkpoint was changed from '{model.title}' to '{now.title}' during the job, so nothing was "
                "saved: load the right checkpoint and start again."
            )
