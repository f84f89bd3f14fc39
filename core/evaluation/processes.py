"""Work spread over the processes that ``accelerate launch`` started; accelerate does the spreading.

A process on its own is the case of one. Everything is shared out whole batch by whole batch, so that each picture is
worked out in the very batch it would be in alone, and the result is the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

__all__ = ["SINGLE_PROCESS", "ProcessGroup", "launched_processes"]

T = TypeVar("T")
# one process may fit a method for long while the others wait
PATIENCE = timedelta(days=2)


class ProcessGroup:
    """One process on its own: it does everything, and asks nobody."""

    count, index = 1, 0

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.index == 0

    @contextmanager
    def split(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """This process' part of the items for the length of a ``with`` block."""
        yield items

    def gather(self, found: list[T]) -> list[T]:
        """What all processes found, one list after the other, for each of them."""
        return found

    def broadcast(self, make: Callable[[], T]) -> T:
        """What the main process makes, for each of them; it is made once."""
        return make()

    def close(self) -> None:
        """Part with the others: nothing can be shared any more."""


SINGLE_PROCESS = ProcessGroup()


class _LaunchedProcesses(ProcessGroup):
    def __init__(self, device: torch.device) -> None:
        # not above: the metrics draw pictures themselves
        from .metrics.extra import require

        accelerate = require("accelerate", "Spreading the pictures over processes")
        self._utils: Any = require("accelerate.utils", "Spreading the pictures over processes")
        self._state: Any = accelerate.PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
        self.count, self.index = self._state.num_processes, self._state.process_index

    @contextmanager
    def split(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        with self._state.split_between_processes(list(items)) as mine:
            # with fewer items than processes, accelerate gives the last one to several
            yield mine if self.count <= len(items) or self.index < len(items) else []

    def gather(self, found: list[T]) -> list[T]:
        gathered: list[T] = self._utils.gather_object(found)
        return gathered

    def broadcast(self, make: Callable[[], T]) -> T:
        made: list[Any] = [None, None]
        if self.is_main:
            try:
                made[0] = make()
            except Exception as error:  # said to all of them, and raised in all: nobody waits for what will not come
                made[1] = error
        self._utils.broadcast_object_list(made)
        if made[1] is not None:
            raise made[1]
        result: T = made[0]
        return result

    def close(self) -> None:
        self._state.destroy_process_group()


def launched_processes(device: torch.device | str = "cpu") -> ProcessGroup:
    """The processes that were started together with this one, by ``accelerate launch`` or ``torchrun``; else itself.

    Raises :class:`ModelError` where there are several and accelerate is missing.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        return SINGLE_PROCESS
    return _LaunchedProcesses(torch.device(device))
