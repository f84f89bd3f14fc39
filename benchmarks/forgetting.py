"""Forget two concepts of each category with one method and measure: `python benchmarks/forgetting.py --count 200`.

The presets were tuned on other concepts (tree, mosaic and Hugo Marsh). Each concept has a replacement, and the others
of its category are its retain set. All share the unedited model's pictures of the retain set, so that this takes less
time than six runs of `forget-concept evaluate`.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn

from forget_concept.core import mini
from forget_concept.core.evaluation import NEGATIVE, PATCHED, UNEDITED, EvaluationTarget, SamplingSettings, evaluate
from forget_concept.core.methods.fit import fit
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.mini.vocabulary import CATEGORIES
from forget_concept.core.progress import ProgressEvent
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

CONCEPTS = (
    Concept("star", "object", "circle"),
    Concept("fish", "object", "arrow"),
    Concept("neon", "style", "sketch"),
    Concept("watercolour", "style", "dotted"),
    Concept("Lena Frost", "identity", "Nadia Pell"),
    Concept("Bruno Finch", "identity", "Otto Brand"),
)
COLUMNS = ["model", "method", "preset", "variant", "category", "concept", "replacement", "n", "steps", "seed"]
SCORES = ["ua", "ira", "cra", "cra_target"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="uce")
    parser.add_argument("--preset", default="tuned")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concept", action="append", help="only this concept; repeatable (default: all six)")
    parser.add_argument("--no-replacement", action="store_true", help="for methods that take no replacement")
    parser.add_argument("--no-preserve", action="store_true", help="for methods that take no retain set")
    parser.add_argument("--negative", action="store_true", help="also measure the concept as a negative prompt")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("forgetting.csv"))
    options = parser.parse_args()
    model, probe = mini.load(), mini.load_probe()
    targets, seconds, sizes, chosen = [], [], [], []
    for concept in CONCEPTS:
        if options.concept and concept.name not in options.concept:
            continue
        others = tuple(word.name for word in CATEGORIES[concept.kind] if word.name != concept.name)
        replacement = None if options.no_replacement else concept.replacement
        request = ForgetRequest(
            (Concept(concept.name, concept.kind, replacement),),
            preserve=() if options.no_preserve else others,
            method=options.method,
            preset=options.preset,
            seed=options.seed,
        )
        began = time.perf_counter()
        patch = fit(model, plan_request(request))
        seconds.append(time.perf_counter() - began)
        sizes.append(patch.nbytes)
        chosen.append((concept, replacement))
        targets.append(EvaluationTarget(concept.name, ((patch, 1.0),)))
    sampling = SamplingSettings(steps=options.steps)
    with Progress(*Progress.get_default_columns(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=None)

        def report(event: ProgressEvent) -> None:
            bar.update(task, total=event.total, completed=event.step)

        baselines = (UNEDITED, NEGATIVE) if options.negative else (UNEDITED,)
        found = evaluate(
            model, probe, targets, options.count, options.seed, sampling, baselines=baselines, progress=report
        )
    new = not options.out.exists()
    with options.out.open("a", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        if new:
            spread = [f"{name}{end}" for name in SCORES for end in ("", "_low", "_high")]
            table.writerow([*COLUMNS, *spread, "seconds", "patch_bytes"])
        for one, (_, replacement), duration, size in zip(found, chosen, seconds, sizes, strict=True):
            for variant, scores in one.scores.items():
                cells = [getattr(scores, name) for name in SCORES]
                values = [f"{v:.4f}" for cell in cells for v in (cell.value, cell.low, cell.high)]
                patched = variant == PATCHED
                method, preset = (options.method, options.preset) if patched else (variant, "")
                row = [model.name, method, preset, variant, one.category, one.concept, replacement if patched else ""]
                row += [options.count, options.steps, options.seed, *values]
                table.writerow([*row, f"{duration:.2f}" if patched else "", size if patched else ""])
                print(
                    one.concept,
                    variant,
                    *(f"{name} {cell.value:.3f}" for name, cell in zip(SCORES, cells, strict=True)),
                )


if __name__ == "__main__":
    main()
