"""Public lists of prompts, read from where a person has them: I2P, UnlearnDiffAtk, Six-CD and any other of that form.

None is needed and none is shipped; their licences are their own.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import RequestError, listed

__all__ = ["ListedPrompt", "read_prompts"]

# the names that I2P and UnlearnDiffAtk give these columns, and the plain ones
_SEEDS = ("evaluation_seed", "sd_seed", "seed")
_GUIDANCES = ("evaluation_guidance", "sd_guidance_scale", "guidance")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class ListedPrompt:
    """A prompt of a list; the seed and the guidance it is meant for, where the list says so."""

    text: str
    seed: int | None = None
    guidance: float | None = None


def read_prompts(path: str | os.PathLike[str], column: str = "prompt") -> tuple[ListedPrompt, ...]:
    """The prompts of a ``.csv`` or ``.tsv`` file with a header, or of a ``.txt`` file with one a line.

    ``column`` is the prompts' (case does not matter); seed and guidance come from the columns of I2P
    (``sd_seed``, ``sd_guidance_scale``) or UnlearnDiffAtk (``evaluation_seed``, ``evaluation_guidance``), or from
    ``seed`` and ``guidance``. Raises :class:`RequestError` naming the file, and the line or the columns there.
    """
    place = Path(path)
    kind = place.suffix.lower()
    if kind not in (*_DELIMITERS, ".txt"):
        raise RequestError(f"The list of prompts '{path}' is none of .csv, .tsv and .txt.")
    try:
        text = place.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"The list of prompts '{path}' is not UTF-8 text.") from error
    except OSError as error:
        raise RequestError(f"The list of prompts '{path}' cannot be read: {error.strerror or error}.") from error
    if kind == ".txt":
        found = [ListedPrompt(line.strip()) for line in text.splitlines() if line.strip()]
    else:
        found = list(_rows(text, _DELIMITERS[kind], column, str(path)))
    if not found:
        raise RequestError(f"The list of prompts '{path}' is empty.")
    return tuple(found)


def _rows(text: str, delimiter: str, column: str, path: str) -> Iterator[ListedPrompt]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="", strict=True)
    try:
        columns = {name.strip().casefold(): name for name in reader.fieldnames or ()}
        if column.strip().casefold() not in columns:
            there = listed(list(reader.fieldnames or ()), 20) or "none at all"
            raise RequestError(f"The list of prompts '{path}' has no column '{column}'; its columns are {there}.")
        prompt = columns[column.strip().casefold()]
        for row in reader:
            where = f"In the list of prompts '{path}', line {reader.line_num},"
            if not (row[prompt] or "").strip():
                raise RequestError(f"{where} there is no prompt.")
            seed = _number(row, columns, _SEEDS, where)
            if seed is not None and (seed < 0 or seed != int(seed)):
                raise RequestError(f"{where} the seed {seed:g} is not a whole number from 0 on.")
            guidance = _number(row, columns, _GUIDANCES, where)
            yield ListedPrompt(row[prompt].strip(), None if seed is None else int(seed), guidance)
    except csv.Error as error:
        raise RequestError(f"The list of prompts '{path}' is no table: {error} (line {reader.line_num}).") from error


def _number(
    row: Mapping[str, str | None], columns: Mapping[str, str], names: tuple[str, ...], where: str
) -> float | None:
    name = next((columns[name] for name in names if name in columns), None)
    text = "" if name is None else (row[name] or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"{where} '{text}' in the column '{name}' is not a number.")
    return value
