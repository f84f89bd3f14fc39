"""Progress of long work, told through one callback that may cancel by raising :class:`Cancelled`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["Progress", "ProgressEvent", "report_progress"]


@dataclass(frozen=True)
class ProgressEvent:
    """One step of long work.

    ``step`` counts up to ``total`` (0: begun, nothing done yet); ``loss`` and ``terms`` (its parts, by name,
    unweighted) are those of this step, ``None`` and empty where the work has no loss (sampling); ``message`` says in
    words what is being done.
    """

    step: int
    total: int
    loss: float | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    message: str = ""


Progress = Callable[[ProgressEvent], None]


def report_progress(progress: Progress | None, event: ProgressEvent) -> None:
    """Pass ``event`` on where someone listens."""
    if progress is not None:
        progress(event)
