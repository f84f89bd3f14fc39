"""Long work as lines of text, for a page that shows one at a time, with an estimate of the time left."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..progress import ProgressEvent

__all__ = ["ProgressText", "TimeLeft", "clock_time"]


def clock_time(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss`` from an hour on."""
    whole = max(int(seconds + 0.5), 0)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class TimeLeft:
    """An estimate of how long the current part of the work still takes, from the pace of its steps so far.

    Each message of the progress events names a part of its own: drawing and training have different paces.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._event: ProgressEvent | None = None
        self._first = (0, 0.0)  # the part's first step and when it was reported

    def update(self, event: ProgressEvent) -> None:
        """Take in an event, as it is reported."""
        last = self._event
        if last is None or event.message != last.message or event.step < self._first[0]:
            self._first = (event.step, self._clock())
        self._event = event

    def seconds(self) -> float | None:
        """Seconds left as of now; ``None`` before the part's second event, and at its end."""
        event = self._event
        if event is None or event.step <= self._first[0] or event.step >= event.total:
            return None
        pace = (self._clock() - self._first[1]) / (event.step - self._first[0])
        return max(pace * (event.total - event.step), 0.0)


class ProgressText:
    """Progress events as a line of text each: the part, the step, the loss and the time left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._time_left = TimeLeft(clock)

    def line(self, event: ProgressEvent) -> str:
        """The line for an event, as it is reported."""
        self._time_left.update(event)
        parts = [f"{event.message or 'working'} {event.step}/{event.total}"]
        if event.loss is not None:
            parts.append(f"loss {event.loss:.4g}")
        if (left := self._time_left.seconds()) is not None:
            parts.append(f"{clock_time(left)} left")
        return ", ".join(parts)
