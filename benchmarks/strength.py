"""What the strength of an edit does on the embedded model: `python benchmarks/strength.py`.

One concept per category is forgotten once, with a replacement and a retain set of two, and its patch is applied at
several strengths, which is the same as a request of that strength. A row of `strength.csv` is one concept at one
strength: `ua`, `ira` and `cra` (`core/evaluation/scores.py`), and `preserved`, the share of pictures of the retain set
alone that show what their prompt names; `n` pictures each. Existing rows are skipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness import SharedSampleCache, Table
from rich.console import Console

from forget_concept.core import mini
from forget_concept.core.evaluation import Picture, SamplingSettings, Score, Variant
from forget_concept.core.evaluation.scores import PATCHED, UNEDITED, EvaluationTarget, score_plan, world_plans
from forget_concept.core.methods.fit import fit
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.mini.world import prompts
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

COLUMNS = ["model", "method", "preset", "category", "concept", "replacement", "preserve", "strength"]
COLUMNS += ["ua", "ira", "cra", "preserved", "n", "drift", "sampler_steps"]
KEY = ["model", "method", "preset", "concept", "strength", "n", "sampler_steps"]
CASES = (
    (Concept("star", "object", "circle"), ("moon", "tree")),
    (Concept("neon", "style", "sketch"), ("comic", "mosaic")),
    (Concept("Lena Frost", "identity", "Nadia Pell"), ("Mira Vale", "Ivy Stone")),
)
STRENGTHS = (1.0, 1.5, 2.0, 3.0, 10.0)


def preserved(category: str, names: tuple[str, ...], count: int) -> list[tuple[Picture, str]]:
    """Pictures of the retain set in turn, each with the name that it must show."""
    found = []
    for i in range(count):
        (prompt,) = prompts(1, 77_000 + i, **{category: names[i % len(names)]})
        found.append((Picture(prompt.text, 5_000 + i), names[i % len(names)]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="uce")
    parser.add_argument("--preset", default="tuned")
    parser.add_argument("--count", type=int, default=24, help="pictures per cell")
    parser.add_argument("--steps", type=int, default=16, help="sampling steps while measuring")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--concept", action="append", help="only this concept; repeatable (default: one per category)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("strength.csv"))
    options = parser.parse_args()
    console = Console(stderr=True)
    table = Table(options.out, COLUMNS, KEY)
    model, probe = mini.load(), mini.load_probe()
    cache = SharedSampleCache(model, probe, SamplingSettings(steps=options.steps, precision=options.precision))
    for concept, keep in CASES:
        if options.concept and concept.name not in options.concept:
            continue
        request = ForgetRequest((concept,), keep, options.method, options.preset)
        patch = fit(model, plan_request(request))
        for strength in STRENGTHS:
            row = {
                "model": model.name,
                "method": options.method,
                "preset": options.preset,
                "category": concept.kind,
                "concept": concept.name,
                "replacement": concept.replacement,
                "preserve": ", ".join(keep),
                "strength": strength,
                "n": options.count,
                "sampler_steps": options.steps,
            }
            if table.has(row):
                continue
            variant = Variant(((patch, strength),))
            target = EvaluationTarget(concept.name, ((patch, strength),))
            # what stands in for the concept is no part of what must stay as it is
            (plan,) = world_plans(
                [target], options.count, without=[concept.replacement or concept.name], baselines=(UNEDITED,)
            )
            kept = preserved(concept.kind, keep, options.count)
            plan.request(cache)
            cache.request(variant, [picture for picture, _ in kept])
            cache.generate()
            found = score_plan(cache, plan, (UNEDITED,))
            scores = found.scores[PATCHED]
            seen = cache.get(variant, [picture for picture, _ in kept])
            right = Score.share(
                [getattr(one.labels, concept.kind) == name for one, (_, name) in zip(seen, kept, strict=True)]
            )
            values = {name: getattr(scores, name).value for name in ("ua", "ira", "cra")}
            table.append(row | values | {"preserved": right.value, "drift": found.drift[PATCHED]})
            shares = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
            console.print(f"{concept.name} at {strength:g}: {shares}, preserved {right.value:.2f}")
            cache.release()


if __name__ == "__main__":
    main()
