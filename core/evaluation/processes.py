"""Distribute work over the processes that ``accelerate launch`` started.

A single process is the special case of one. Work is distributed in whole batches, so that each image is computed in
the same batch as in a single process and the result is the same.
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
# one process may fit a method for a long time while the others wait
TIMEOUT = timedelta(days=2)


class ProcessGroup:
    """A group of processes; this base class is a group of one."""

    count, index = 1, 0

    @property
    def is_main(self) -> bool:
        """Whether this process reports progress and writes files for the group."""
        return self.index == 0

    @contextmanager
    def split(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """Yield this process's share of the items."""
        yield items

    def gather(self, found: list[T]) -> list[T]:
        """Return the concatenated lists of all processes, in every process."""
        return found

    def broadcast(self, make: Callable[[], T]) -> T:
        """Call ``make`` in the main process only, and return its result in every process."""
        return make()

    def close(self) -> None:
        """Leave the group; no communication is possible afterwards."""


SINGLE_PROCESS = ProcessGroup()


class _LaunchedProcesses(ProcessGroup):
    def __init__(self, device: torch.device) -> None:
        # a local import, because the metrics import this package
        from .metrics.extra import require

        accelerate = require("accelerate", "Sampling with several processes")
        self._utils: Any = require("accelerate.utils", "Sampling with several processes")
        self._state: Any = accelerate.PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
        self.count, self.index = self._state.num_processes, self._state.process_index

    @contextmanager
    def split(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        with self._state.split_between_processes(list(items)) as mine:
            # with fewer items than processes, accelerate assigns the last item to several of them
            yield mine if self.count <= len(items) or self.index < len(items) else []

    def gather(self, found: list[T]) -> list[T]:
        gathered: list[T] = self._utils.gather_object(found)
        return gathered

    def broadcast(self, make: Callable[[], T]) -> T:
        made: list[Any] = [None, None]
        if self.is_main:
            try:
                made[0] = make()
            except Exception as error:  # broadcast and raised in all processes, so that the others do not hang
                made[1] = error
        self._utils.broadcast_object_list(made)
        if made[1] is not None:
            raise made[1]
        result: T = made[0]
        return result

    def close(self) -> None:
        self._state.destroy_process_group()


def launched_processes(device: torch.device | str = "cpu") -> ProcessGroup:
    """Return the group that ``accelerate launch`` or ``torchrun`` started, or :data:`SINGLE_PROCESS`.

    Raises:
        ModelError: If there are several processes and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        return SINGLE_PROCESS
    return _LaunchedProcesses(torch.device(device))
