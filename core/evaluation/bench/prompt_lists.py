"""Read public prompt lists such as I2P, UnlearnDiffAtk and Six-CD from local files.

The lists are optional and not distributed with this project; their own licences apply.
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
from ...files.reading import read_text

__all__ = ["ListedPrompt", "read_prompts"]

# column names of I2P and UnlearnDiffAtk, and the plain ones
_SEEDS = ("evaluation_seed", "sd_seed", "seed")
_GUIDANCES = ("evaluation_guidance", "sd_guidance_scale", "guidance")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class ListedPrompt:
    """A prompt of a list, with its seed and guidance if the list specifies them."""

    text: str
    seed: int | None = None
    guidance: float | None = None


def read_prompts(path: str | os.PathLike[str], column: str = "prompt") -> tuple[ListedPrompt, ...]:
    """Read prompts from a ``.csv`` or ``.tsv`` file with a header, or from a ``.txt`` file with one prompt per line.

    Seed and guidance come from the columns of I2P (``sd_seed``, ``sd_guidance_scale``) or UnlearnDiffAtk
    (``evaluation_seed``, ``evaluation_guidance``), or from ``seed`` and ``guidance``.

    Args:
        path: The file.
        column: Name of the prompt column; case is ignored.

    Raises:
        RequestError: If the file cannot be read; the message names the file, and the line or the columns.
    """
    place = Path(path)
    kind = place.suffix.lower()
    if kind not in (*_DELIMITERS, ".txt"):
        raise RequestError(f"The list of prompts '{path}' has an unsupported type: use .csv, .tsv or .txt.")
    text = read_text(place, "The list of prompts", RequestError)
    if kind == ".txt":
        found = [ListedPrompt(line.strip()) for line in text.splitlines() if line.strip()]
    else:
        found = list(_rows(text, _DELIMITERS[kind], column, str(path)))
    if not found:
        raise RequestError(f"The list of prompts '{path}' is empty: give a file with at least one prompt.")
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
                raise RequestError(f"{where} the seed {seed:g} is not a whole number of at least 0.")
            guidance = _number(row, columns, _GUIDANCES, where)
            yield ListedPrompt(row[prompt].strip(), None if seed is None else int(seed), guidance)
    except csv.Error as error:
        raise RequestError(f"The list of prompts '{path}' is not a table: {error} (line {reader.line_num}).") from error


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
