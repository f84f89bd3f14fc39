"""Forget in an embedded model of any shape and measure: `python benchmarks/families.py --model mini-xl`.

Two concepts of each category, each with a replacement, and the others of its category to preserve; the settings were
chosen on other concepts. `--no-pooled` leaves the vector of the whole prompt as it is. A negative prompt is measured
beside it: at CFG 1 it does nothing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from forgetting import CONCEPTS
from harness import Table

from forget_concept.core import mini
from forget_concept.core.evaluation import NEGATIVE, PATCHED, UNEDITED, EvaluationTarget, SamplingSettings, evaluate
from forget_concept.core.methods.fit import fit
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.mini.files import NAMES
from forget_concept.core.mini.vocabulary import CATEGORIES
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

COLUMNS = ["model", "method", "preset", "concept", "category", "pooled", "cfg"]
SCORES = ["ua", "ira", "cra", "cra_target"]
MEASURED = [*SCORES, "n", "seconds", "patch_bytes"]


def request_for(concept: Concept, options: argparse.Namespace) -> ForgetRequest:
    others = tuple(word.name for word in CATEGORIES[concept.kind] if word.name != concept.name)
    settings = {"pooled": False} if options.no_pooled else {}
    return ForgetRequest(
        (concept,), preserve=others, method=options.method, preset=options.preset, settings=settings, seed=options.seed
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=NAMES, default=NAMES[-1])
    parser.add_argument("--method", default="uce")
    parser.add_argument("--preset", default="tuned")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, help="default: 8 at CFG 1, else 16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concept", action="append", help="only this concept; repeatable (default: all six)")
    parser.add_argument("--no-pooled", action="store_true", help="leave the vector of the whole prompt as it is")
    parser.add_argument("--negative", action="store_true", help="also measure the concept as a negative prompt")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("families.csv"))
    options = parser.parse_args()
    model, probe = mini.load(name=options.model), mini.load_probe()
    chosen = [concept for concept in CONCEPTS if not options.concept or concept.name in options.concept]
    targets, costs = [], []
    for concept in chosen:
        began = time.perf_counter()
        patch = fit(model, plan_request(request_for(concept, options)))
        costs.append((time.perf_counter() - began, patch.nbytes))
        targets.append(EvaluationTarget(concept.name, ((patch, 1.0),)))
    steps = options.steps or (8 if model.guidance == 1 else 16)
    sampling = SamplingSettings(steps=steps, guidance=model.guidance)
    baselines = (UNEDITED, NEGATIVE) if options.negative else (UNEDITED,)
    found = evaluate(model, probe, targets, options.count, options.seed, sampling, baselines=baselines)
    table = Table(options.out, [*COLUMNS, *MEASURED], COLUMNS)
    for one, (seconds, size) in zip(found, costs, strict=True):
        for variant, scores in one.scores.items():
            patched = variant == PATCHED
            row: dict[str, Any] = {
                "model": model.name,
                "method": options.method if patched else variant,
                "preset": options.preset if patched else "",
                "concept": one.concept,
                "category": one.category,
                "pooled": "" if not patched else "no" if options.no_pooled else "yes",
                "cfg": f"{model.guidance:g}",
                **{name: f"{getattr(scores, name).value:.4f}" for name in SCORES},
                "n": options.count,
                "seconds": f"{seconds:.2f}" if patched else "",
                "patch_bytes": size if patched else "",
            }
            print(*row.values())
            if not table.has(row):
                table.append(row)


if __name__ == "__main__":
    main()
