"""What a command says: results on standard output, progress and complaints on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..progress import Progress, ProgressEvent

__all__ = ["Console"]


class Console:
    """Words and tables for a person, or one JSON object for a program (``as_json``), never both.

    Progress goes to standard error in either case: a bar on a terminal, one line for each long piece of work elsewhere.
    """

    def __init__(self, as_json: bool = False) -> None:
        from rich.console import Console as RichConsole

        self.as_json = as_json
        # what goes into a file or a pipe is not broken at 80 columns
        width = None if sys.stdout.isatty() else 200
        self._out = RichConsole(highlight=False, soft_wrap=True, markup=False, emoji=False, width=width)
        self._err = RichConsole(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def say(self, text: str = "") -> None:
        """A line of the result, for a person."""
        if not self.as_json:
            self._out.print(text)

    def note(self, text: str) -> None:
        """A remark that is no result; to standard error, also beside JSON."""
        self._err.print(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
        """A table; every column but the first is set flush right."""
        if self.as_json:
            return
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self._out.print(table, soft_wrap=False)

    def result(self, data: Mapping[str, Any]) -> None:
        """The one JSON object of a command."""
        if self.as_json:
            sys.stdout.write(json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n")
            sys.stdout.flush()

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Progress]:
        """A progress callback for the length of a ``with`` block."""
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
