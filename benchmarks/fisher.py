"""Fisher information of the embedded model: the estimators compared with the exact value, on the same samples.

`python benchmarks/fisher.py` takes some minutes and fills `fisher.csv`, one row per run. Existing rows are not computed
again. The exact value here uses `--times` evenly spaced time steps instead of all 1,000; the estimators draw from the
same list, so they are unbiased for it. Samples are the model's own pictures of prompts of its vocabulary. `naive`
estimates the sum inside the square from the drawn steps; `exact` with fewer samples shows what the same number of
passes achieves without drawing. `bias` is the ratio of the sums over all weights before clamping, `clamped` the same
after clamping, `spearman` the rank correlation over all weights, and `error` the relative error ‖F̂ − F‖ / ‖F‖.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from forget_concept.core import mini
from forget_concept.core.files.workspace import Workspace, key_of
from forget_concept.core.mini import world
from forget_concept.core.models.text_encoders import encode_prompts
from forget_concept.core.training.fisher import FisherSettings, FisherSum

COLUMNS = ["model", "projections", "weights", "times", "estimator", "draws", "samples", "run", "passes"]
MEASURES = ["bias", "clamped", "negative", "spearman", "error", "core_seconds"]


class Redrawn(FisherSum):
    """Draws other time steps in every run, with the same noise."""

    run = 0

    def _draw_steps(self, sample: int) -> list[int]:
        return super()._draw_steps(sample + 1_000_000 * self.run)


class Naive(Redrawn):
    """The square of the estimated sum, which is biased by the variance of the estimate."""

    def _square(self, total: Tensor, scatter: Tensor | None) -> Tensor:
        return (self.stratum / 2) ** 2 * total.square()


def ranks(values: Tensor) -> Tensor:
    """Ranks, averaged over equal values (clamping produces many zeros)."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]


def spearman(a: Tensor, b: Tensor) -> float:
    a, b = (x - x.mean() for x in (ranks(a), ranks(b)))
    return float(a @ b / (a.norm() * b.norm()))


def flat(total: FisherSum) -> Tensor:
    """The unclamped means of all weights."""
    state = total.state()
    return torch.cat([state[key].flatten() for key in total.linears]).double() / total.count


def plans(samples: int, times: int, budgets: list[int], runs: int) -> Iterator[tuple[str, int, int, int]]:
    """``(estimator, draws, samples, run)`` of every row; the exact value on all samples comes first."""
    fewer = [n for n in (samples // 2, samples // 4, samples // 8) if n]
    yield from (("exact", times // 2, n, 0) for n in [samples, *fewer])
    for draws in budgets:
        for run in range(runs):
            yield from ((estimator, draws, samples, run) for estimator in ("halves", "pairs", "naive"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 5], help="time steps per half")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--train", nargs="+", default=["to_k", "to_v"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "forget-concept-fisher")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("fisher.csv"))
    options = parser.parse_args()
    model, space = mini.load(), Workspace(options.work)
    keys = [site.key(which) for site in model.survey for which in options.train]
    prompts = [prompt.text for prompt in world.prompts(options.samples, options.seed)]
    latents = model.sample(prompts, range(options.samples), 16, 2.5, sampler="dpm++")
    states = encode_prompts(model.text, prompts)
    done = set()
    if options.out.exists():
        with options.out.open(newline="", encoding="utf-8") as file:
            done = {tuple(row[name] for name in COLUMNS[:-1]) for row in csv.DictReader(file)}
    reference = None
    for estimator, draws, samples, run in plans(options.samples, options.times, options.budgets, options.runs):
        kind = Naive if estimator == "naive" else Redrawn
        settings = FisherSettings(
            "halves" if estimator == "naive" else estimator, samples, options.times, draws, 10, seed=options.seed
        )
        total = kind(model, keys, settings)
        total.run = run
        weights = sum(linear.weight.numel() for linear in total.linears.values())
        row = [model.name, "+".join(options.train), weights, options.times, estimator, draws, samples, run]
        name = key_of(model.model_hash, keys, prompts, row)
        is_reference = reference is None
        # every later row needs the reference, so it is cached, also when incomplete
        found = space.load("fisher-benchmark", name) if is_reference else None
        if tuple(map(str, row)) in done and not is_reference:
            continue
        if found is not None:
            total.restore(found)
        began = time.process_time()
        for n in range(total.count, samples):
            total.add(latents[n : n + 1], states.index([n]))
            if is_reference:
                space.save("fisher-benchmark", name, total.state())
        took = time.process_time() - began
        value = flat(total)
        reference = value if is_reference else reference
        if tuple(map(str, row)) in done:
            continue
        result = total.result()
        clamped = value.clamp(min=0)
        measures = [
            value.sum() / reference.sum(),
            clamped.sum() / reference.sum(),
            result.negative,
            spearman(clamped, reference),
            (clamped - reference).norm() / reference.norm(),
        ]
        new = not options.out.exists()
        with options.out.open("a", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            if new:
                table.writerow([*COLUMNS, *MEASURES])
            passes = samples * (options.times if estimator == "exact" else 2 * draws)
            # a resumed reference has no meaningful time
            timed = "" if found is not None else f"{took:.1f}"
            table.writerow([*row, passes, *(f"{float(m):.4f}" for m in measures), timed])
        print(
            estimator,
            draws,
            samples,
            run,
            *(f"{n} {float(m):.3f}" for n, m in zip(MEASURES, measures, strict=False)),
            timed,
        )


if __name__ == "__main__":
    main()
