"""Long work as lines of text, for a page that shows one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..progress import ProgressEvent

__all__ = ["ProgressText", "clock_time"]


def clock_time(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss`` from an hour on."""
    whole = max(int(seconds + 0.5), 0)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class ProgressText:
    """Long work as a line of text at a time: what is done, which step, the loss, how long it will take."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._message: str | None = None
        self._first = (0, 0.0)

    def line(self, event: ProgressEvent) -> str:
        now = self._clock()
        if event.message != self._message or event.step < self._first[0]:
            self._message, self._first = event.message, (event.step, now)
        parts = [f"{event.message or 'working'} {event.step}/{event.total}"]
        if event.loss is not None:
            parts.append(f"loss {event.loss:.4g}")
        done, taken = event.step - self._first[0], now - self._first[1]
        if done > 0 and event.step < event.total:
            parts.append(f"{clock_time(taken / done * (event.total - event.step))} left")
        return ", ".join(parts)
