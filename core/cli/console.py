"""Output of a command: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..files.names import printable
from ..progress import Progress, ProgressEvent

__all__ = ["Console"]


class Console:
    """Prints either text and tables for a person, or one JSON object for a program.

    Progress goes to standard error in both cases: as a bar on a terminal, otherwise as one line per long task.

    Args:
        as_json: Print only the JSON object.
    """

    def __init__(self, as_json: bool = False) -> None:
        from rich.console import Console as RichConsole

        self.as_json = as_json
        # do not wrap at 80 columns in a file or a pipe
        width = None if sys.stdout.isatty() else 200
        self._out = RichConsole(highlight=False, soft_wrap=True, markup=False, emoji=False, width=width)
        self._err = RichConsole(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def say(self, text: str = "") -> None:
        """Print a line of the result; not with ``as_json``."""
        if not self.as_json:
            self._out.print(printable(text))

    def note(self, text: str) -> None:
        """Print a remark to standard error, with ``as_json`` too."""
        self._err.print(printable(text))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
        """Print a table; every column but the first is right-aligned."""
        if self.as_json:
            return
        from rich import box
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD,
            title=None if title is None else printable(title),
            title_justify="left",
            title_style="bold",
        )
        for i, column in enumerate(columns):
            table.add_column(printable(column), justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*map(printable, row))
        self._out.print(table, soft_wrap=False)

    def result(self, data: Mapping[str, Any]) -> None:
        """Print the JSON object of a command; only with ``as_json``."""
        if self.as_json:
            text = json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
            sys.stdout.flush()
            if (raw := getattr(sys.stdout, "buffer", None)) is None:
                sys.stdout.write(text)
            else:  # JSON is UTF-8, whatever the console's encoding
                raw.write(text.encode())
            sys.stdout.flush()

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Progress]:
        """Show the progress of the task ``what``; yields the callback that reports it."""
        began = time.perf_counter()
        if not self._err.is_terminal:
            yield lambda event: None
            self.note(f"{what}: {time.perf_counter() - began:.1f} s")
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        with Bars(*columns, console=self._err, transient=True) as bars:
            task = bars.add_task(what, total=None, loss="")

            def update(event: ProgressEvent) -> None:
                loss = "" if event.loss is None else f"loss {event.loss:.4g}"
                bars.update(task, completed=event.step, total=event.total, loss=loss)

            yield update
