"""Choose the learning rate of the presets `published_scaled`: `python benchmarks/learning_rates.py`.

A trained method's `published_scaled` is its preset `published` with the learning rate times one factor. The factor is
chosen here on tree, mosaic and Hugo Marsh, which no table of results has, by one rule for all methods: of
:data:`FACTORS` the smallest at which the mean unlearning accuracy (UA) of the three is 90 % or more; if there is none,
the largest at which their mean in-domain retain accuracy (IRA) is. UA is taken to grow with the factor, and IRA to
fall, so the factor is found by bisection, and the table has the factors that were tried; a factor is given up as soon
as its mean cannot reach 90 % any more.

Requests are those of `methods.py`: with a replacement and a preserve list where the preset accepts them. A row of
`learning_rates.csv` is one fit; existing rows are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import SharedSampleCache, Table, costing
from methods import Fitted, embedded, measured, plan_of
from rich.console import Console
from runs import Run, fullest_request

from forget_concept.core.evaluation import PATCHED, SamplingSettings
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.methods.fit import fit
from forget_concept.core.methods.registry import get, plan_request
from forget_concept.core.request.concept import Concept

METHODS = ("forget_me_not", "duge", "selective_amnesia")
CONCEPTS = (
    Concept("tree", "object", "house"),
    Concept("mosaic", "style", "checkered"),
    Concept("Hugo Marsh", "identity", "Otto Brand"),
)
FACTORS = (1, 3, 10, 30, 100, 300, 1000)
ENOUGH = 0.9
KEY = ["model", "method", "factor", "concept", "n"]
COLUMNS = ["model", "method", "factor", "lr", "category", "concept", "replacement", "ua", "ira", "cra", "n", "seconds"]


def first_index(holds: Callable[[int], bool], count: int) -> int | None:
    """The first of ``count`` indices at which a condition holds that holds from there on; ``None``: it never does."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low if low < count else None


def chosen_factor(reaches: Callable[[int, str], bool]) -> int:
    """The factor that the rule of this module chooses, of :data:`FACTORS`.

    Args:
        reaches: Whether the mean of a score over the tuning concepts reaches :data:`ENOUGH` at a factor.
    """
    forgets = first_index(lambda i: reaches(FACTORS[i], "ua"), len(FACTORS))
    if forgets is not None:
        return FACTORS[forgets]
    spoils = first_index(lambda i: not reaches(FACTORS[i], "ira"), len(FACTORS))
    return FACTORS[(len(FACTORS) if spoils is None else max(spoils, 1)) - 1]


def reaches(score: str, rows: Callable[[Concept], Mapping[str, str]]) -> bool:
    """Whether the mean of a score reaches :data:`ENOUGH`; asks for no more rows than are needed to know."""
    best = float(len(CONCEPTS))
    for concept in CONCEPTS:
        best -= max(1 - float(rows(concept)[score]), 0)
        if best < ENOUGH * len(CONCEPTS):
            return False
    return True


def tabled(rows: Iterable[Mapping[str, str]], method: str, factor: int, concept: Concept) -> Mapping[str, str]:
    """The row of a fit.

    Raises:
        KeyError: It is not in the table.
    """
    for row in rows:
        if (row["method"], row["factor"], row["concept"]) == (method, f"{factor}", concept.name):
            return row
    raise KeyError(f"{method} at {factor} times on {concept.name}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", action="append", choices=METHODS, help="only this method; repeatable")
    parser.add_argument("--count", type=int, default=48, help="pictures in each cell of an evaluation")
    parser.add_argument("--work", type=Path, help="folder to cache pictures and Fisher information")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("learning_rates.csv"))
    options = parser.parse_args(argv)
    console, table = Console(stderr=True), Table(options.out, COLUMNS, KEY)
    model, probe, by = embedded("cpu")
    workspace = Workspace(options.work) if options.work else None
    cache = SharedSampleCache(model, probe, SamplingSettings(), workspace, by)

    def row_of(method: str, factor: int, concept: Concept) -> dict[str, Any]:
        run = Run(method, "published", "sum", concept, 0)
        wanted = fullest_request(model, run)
        lr = get(method).presets["published"].lr * factor
        request = dataclasses.replace(wanted.request, settings=dict(wanted.request.settings) | {"lr": lr})
        inputs = dataclasses.replace(wanted.inputs, workspace=workspace)
        with costing(model) as cost:
            patch = fit(model, plan_request(request), None, inputs)
        made = Fitted(PATCHED, ((patch, 1.0),), cost)
        scores = measured(model, run, made, plan_of(run, made, options.count), cache, None)
        cache.release()
        of_request = {"replacement": request.concepts[0].replacement or "", "lr": f"{lr:g}", "factor": factor}
        return {name: (scores | of_request)[name] for name in COLUMNS}

    def row(method: str, factor: int, concept: Concept) -> Mapping[str, str]:
        key = dict(zip(KEY, (model.name, method, factor, concept.name, options.count), strict=True))
        if not table.has(key):
            table.append(row_of(method, factor, concept))
            console.print(table.rows[-1])
        return table.row(key)

    for method in options.method or METHODS:
        factor = chosen_factor(
            lambda factor, score, method=method: reaches(score, partial(row, method, factor))  # type: ignore[misc]
        )
        for concept in CONCEPTS:
            row(method, factor, concept)
        console.print(f"{method}: {factor} times")


if __name__ == "__main__":
    main()
