"""Results of a benchmark in a file that is written row by row, so that an interrupted run resumes."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ForgetConceptError, RequestError
from ...files.json_text import parse_json
from ...files.reading import read_text
from ...files.writing import write_bytes
from ..intervals import Score
from .run import PARTS, BenchRow

__all__ = ["BenchResults", "check_results", "mean_scores", "read_settings"]

SCHEMA_VERSION = 1
_SCORE = ("value", "low", "high", "n")
_PLAIN = ("concept", "category", "variant", "n_target", "n_kept")
_COLUMNS = (
    *_PLAIN,
    *(part if field == "value" else f"{part}_{field}" for part in PARTS for field in _SCORE),
    "drift",
    "settings",
)


def check_results(path: Path) -> None:
    """Raise :class:`RequestError` if the file's extension is not a result format."""
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise RequestError(f"'{path}' cannot be written: results are .jsonl (JSON Lines) or .csv files.")


class BenchResults:
    """Benchmark results in memory and, with a ``path``, in a ``.jsonl`` or ``.csv`` file.

    Each row is synchronized to disk. A JSON Lines file starts with a line of settings; a CSV file repeats them in each
    row. An incomplete last line is dropped.

    Args:
        path: The file; ``None`` keeps the rows in memory only.
        settings: Settings of the run, which must equal those in an existing file.

    Raises:
        RequestError: If the file has another type, does not hold benchmark results, or holds results of other settings;
            the message names the first setting that differs.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.rows: list[BenchRow] = []
        if path is None:
            return
        check_results(path)
        self._csv = path.suffix.lower() == ".csv"
        if path.exists():
            self._read(path)

    @property
    def done(self) -> set[tuple[str, str]]:
        """The concept and variant of each existing row."""
        return {(row.concept, row.variant) for row in self.rows}

    def add(self, row: BenchRow) -> None:
        """Append a row."""
        if self.path is not None:
            text = self._csv_line(row) if self._csv else self._line(row.as_dict())
            if not self.path.exists() or self.path.stat().st_size == 0:
                text = self._head() + text
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        self.rows.append(row)

    # -- writing -------------------------------------------------------------------------------------------------

    @staticmethod
    def _line(data: Mapping[str, Any]) -> str:
        return json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n"

    def _head(self) -> str:
        return _csv_text(_COLUMNS) if self._csv else self._line({"schema": SCHEMA_VERSION, "settings": self.settings})

    def _csv_line(self, row: BenchRow) -> str:
        cells = [str(getattr(row, name)) for name in _PLAIN]
        for part in PARTS:
            score = row.scores.get(part)
            cells += [""] * len(_SCORE) if score is None else [repr(getattr(score, field)) for field in _SCORE]
        return _csv_text([*cells, repr(row.drift), json.dumps(self.settings, ensure_ascii=False)])

    # -- reading -------------------------------------------------------------------------------------------------

    def _read(self, path: Path) -> None:
        text = read_text(path, "The file of results", RequestError)
        whole = text[: text.rfind("\n") + 1]
        try:
            rows = self._csv_rows(whole) if self._csv else self._json_rows(whole)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, csv.Error) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(
                f"'{path}' does not contain benchmark results: choose another --out, or move the file away."
            ) from error
        if whole != text:
            write_bytes(path, whole.encode())
        self.rows = rows

    def _json_rows(self, text: str) -> list[BenchRow]:
        lines = text.splitlines()
        if not lines:
            return []
        head = parse_json(lines[0])
        if head["schema"] != SCHEMA_VERSION:
            raise RequestError(f"'{self.path}' has schema {head['schema']!r}; this version reads {SCHEMA_VERSION}.")
        self._check(head["settings"])
        return [_row(parse_json(line)) for line in lines[1:]]

    def _csv_rows(self, text: str) -> list[BenchRow]:
        if not text:
            return []
        table = csv.DictReader(io.StringIO(text, newline=""))
        if tuple(table.fieldnames or ()) != _COLUMNS:
            raise ValueError("other columns")
        rows = []
        for cells in table:
            self._check(parse_json(cells["settings"]))
            scores = {
                part: {f: cells[part if f == "value" else f"{part}_{f}"] for f in _SCORE} if cells[part] else None
                for part in PARTS
            }
            rows.append(_row({**cells, "scores": scores}))
        return rows

    def _check(self, there: Mapping[str, Any]) -> None:
        for name in dict.fromkeys((*self.settings, *there)):
            old, new = there.get(name), self.settings.get(name)
            if old != new:
                raise RequestError(
                    f"'{self.path}' holds results of other settings ({name}: {_display_value(old)} there, "
                    f"{_display_value(new)} now): choose another --out, or move the file away."
                )


def read_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings of the results in a file, or ``None`` if they cannot be read."""
    if not path.exists():
        return None
    try:
        text = read_text(path, "The file of results")
        if path.suffix.lower() == ".csv":
            return next((parse_json(row["settings"]) for row in csv.DictReader(io.StringIO(text, newline=""))), None)
        return dict(parse_json(text.partition("\n")[0])["settings"])
    except (ForgetConceptError, ValueError, KeyError, TypeError, AttributeError, csv.Error):
        return None  # BenchResults raises the detailed error


def _display_value(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _csv_text(cells: Sequence[str]) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue()


def _row(data: Mapping[str, Any]) -> BenchRow:
    scores = {
        part: None
        if score is None
        else Score(_finite(score["value"]), _finite(score["low"]), _finite(score["high"]), int(score["n"]))
        for part, score in data["scores"].items()
    }
    return BenchRow(
        str(data["concept"]),
        str(data["category"]),
        str(data["variant"]),
        int(data["n_target"]),
        int(data["n_kept"]),
        scores,
        _finite(data["drift"]),
    )


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return number


def mean_scores(rows: Sequence[BenchRow]) -> dict[str, float | None]:
    """Return the mean of each part and of the drift, over the rows that have it; ``None`` if no row does."""
    found: dict[str, float | None] = {}
    for part in PARTS:
        values = [score.value for row in rows if (score := row.scores.get(part)) is not None]
        found[part] = sum(values) / len(values) if values else None
    found["drift"] = sum(row.drift for row in rows) / len(rows) if rows else None
    return found
