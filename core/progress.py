"""Progress of long work, reported to a callback that may cancel it by raising :class:`Cancelled`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["Progress", "ProgressEvent", "report_progress"]


@dataclass(frozen=True)
class ProgressEvent:
    """One step of long work.

    Args:
        step: Number of finished steps; 0: the work has started.
        total: Number of all steps.
        loss: Loss of this step; ``None``: the work has no loss, such as sampling.
        terms: Unweighted terms of the loss, by name.
        message: What is being done.
    """

    step: int
    total: int
    loss: float | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    message: str = ""


Progress = Callable[[ProgressEvent], None]


def report_progress(progress: Progress | None, event: ProgressEvent) -> None:
    """Pass ``event`` to the callback, if there is one."""
    if progress is not None:
        progress(event)
