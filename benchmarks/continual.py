"""Continual unlearning: twelve requests in sequence for each method, measured after every step.

`python benchmarks/continual.py` fills `continual.csv`, one row per step. Existing rows are not measured again. With
`--work`, an interrupted sequence resumes from its last step; without it, its fits are repeated. Each request goes
through `core/methods/sequence.py` with the method's tuned preset, a replacement and, as retain set, every concept of
its category that is never forgotten, which is more than half of the category. Options that a preset rejects are left
out for the whole sequence, with a message. Seed 0 takes the requests in the order below; other seeds shuffle them.

- `step`: 0 is the base model; its `ua_all` is the error rate of the unedited model on all twelve targets;
- `ua_all`: unlearning accuracy over the prompts of *all* targets so far;
- `ira`, `cra`: in-domain and cross-domain retain accuracy relative to the base model, on concepts that are never
  forgotten; mean over the targets so far;
- `weight_drift`: ‖ΔW‖ / ‖W‖ over all cross-attention projections (Frobenius norm);
- `seconds`: time of this step's fit.

Prompts and seeds of the pictures are the same at every step. `docs/continual.png` shows the curves.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import RunProgress, SharedSampleCache, Table, costing
from methods import embedded
from runs import CONCEPTS, Run, fullest_request

from forget_concept.core.errors import ForgetConceptError
from forget_concept.core.evaluation import PATCHED, UNEDITED, Evaluation, EvaluationTarget, SamplingSettings, evaluate
from forget_concept.core.evaluation.weight_drift import weight_drift
from forget_concept.core.files.workspace import Workspace, key_of
from forget_concept.core.formats import kohya
from forget_concept.core.methods.registry import all_methods, plan_request
from forget_concept.core.methods.sequence import History
from forget_concept.core.mini.vocabulary import CATEGORIES
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

# replacements are never forgotten, nor are the concepts on which the presets were tuned (tree, mosaic, Hugo Marsh)
REQUESTS = (
    *CONCEPTS,
    Concept("umbrella", "object", "mushroom"),
    Concept("checkered", "style", "blueprint"),
    Concept("house", "object", "boat"),
)
TARGETS = tuple(concept.name for concept in REQUESTS)
COLUMNS = ["method", "seed", "step", "ua_all", "ira", "cra", "weight_drift", "seconds"]
KEY = ["method", "seed", "step"]
COUNT = 32


def ordered(seed: int) -> list[Concept]:
    """The requests in the order that a seed determines."""
    found = list(REQUESTS)
    if seed:
        random.Random(seed).shuffle(found)
    return found


def retain_set(category: str) -> tuple[str, ...]:
    """The retain set of a category: its concepts that no request forgets."""
    return tuple(word.name for word in CATEGORIES[category] if word.name not in TARGETS)


def _row(
    method: str, seed: int, step: int, found: Sequence[Evaluation], drift: float, seconds: float
) -> dict[str, Any]:
    scores = [one.scores[PATCHED] for one in found]

    def mean(name: str) -> float:
        return sum(getattr(each, name).value for each in scores) / len(scores)

    row = {"method": method, "seed": seed, "step": step, "ua_all": mean("ua"), "ira": mean("ira"), "cra": mean("cra")}
    return row | {"weight_drift": drift, "seconds": seconds}


class RequestSequence:
    """The sequence of requests for one method, fitted one step at a time."""

    def __init__(
        self, model: LatentDiffusion, method: str, preset: str, seed: int, workspace: Workspace | None
    ) -> None:
        self.model, self.method, self.preset, self.seed = model, method, preset, seed
        self.order = ordered(seed)
        self.workspace = workspace
        self.history, self.step, self.seconds = History(), 0, 0.0
        # which options the preset accepts is determined with the first request
        first = fullest_request(model, Run(method, preset, "", self.order[0], seed), retain_set(self.order[0].kind))
        self.replaced, self.preserved = bool(first.request.concepts[0].replacement), bool(first.request.preserve)
        self.note = first.note

    def _path(self, step: int) -> Path | None:
        if self.workspace is None:
            return None
        names = [concept.name for concept in self.order[:step]]
        key = key_of(self.model.model_hash, self.method, self.preset, self.seed, names)
        return self.workspace.path("continual", key)

    def resume(self, step: int) -> None:
        """Load the latest step up to ``step`` that the workspace holds."""
        for at in range(step, 0, -1):
            path = self._path(at)
            if path is not None and path.exists():
                self.history = History.from_patch(kohya.load(path, self.model.survey))
                self.step = at
                return

    def forward(self, progress: RunProgress) -> None:
        """Fit the next request."""
        concept = self.order[self.step]
        request = ForgetRequest(
            (Concept(concept.name, concept.kind, concept.replacement if self.replaced else None),),
            preserve=retain_set(concept.kind) if self.preserved else (),
            method=self.method,
            preset=self.preset,
            seed=self.seed,
        )
        with costing(self.model) as cost:
            self.history = self.history.forget(self.model, plan_request(request), progress)
        self.step, self.seconds = self.step + 1, cost.seconds
        path = self._path(self.step)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            kohya.save(self.history.patch, path, self.model.survey)

    @property
    def past(self) -> list[str]:
        return [concept.name for concept in self.order[: self.step]]


# -- the plot -----------------------------------------------------------------------------------------------------

# distinguishable with colour vision deficiency (Okabe and Ito) and in greyscale
PALETTE = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (90, 90, 90))
PAPER, INK, FAINT, GRID = (255, 255, 255), (28, 30, 36), (110, 114, 122), (226, 228, 232)
PANELS = (
    ("ua_all", "All targets so far: forgotten"),
    ("ira", "Retained, same category"),
    ("cra", "Retained, other categories"),
)
SCALE = 2  # supersampling, for smooth lines
PLOT, LEFT, TOP, GAP, BELOW = (400, 300), 64, 92, 72, 56


def plot(rows: Sequence[Mapping[str, str]]) -> Image:
    """Plot the three scores over the steps: a line per method (mean over seeds), thin lines for single seeds."""
    from PIL import Image, ImageDraw
    from PIL.Image import Resampling

    methods = list(dict.fromkeys(row["method"] for row in rows))
    last = max(int(row["step"]) for row in rows)
    size = (LEFT + len(PANELS) * (PLOT[0] + GAP) - GAP + 40, TOP + PLOT[1] + BELOW)
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), PAPER)
    draw = ImageDraw.Draw(image)
    x = LEFT
    for method, colour in zip(methods, _colours(len(methods)), strict=True):
        _line(draw, [(x, 30), (x + 28, 30)], colour, 3)
        x += 36 + _write(draw, (x + 36, 21), method, 16) + 28
    for number, (name, title) in enumerate(PANELS):
        left = LEFT + number * (PLOT[0] + GAP)
        _write(draw, (left, TOP - 34), title, 17)
        values = [float(row[name]) for row in rows]
        # whole ticks; starts at 0 only for ua_all
        low = math.floor(20 * min(0.0 if name == "ua_all" else 0.8, *values)) / 20
        high = math.ceil(20 * max(1.0, *values)) / 20
        tick = next((t for t in (0.05, 0.1, 0.2, 0.5) if (high - low) / t <= 6), 1.0)

        def at(
            step: float, value: float, left: int = left, low: float = low, high: float = high
        ) -> tuple[float, float]:
            return left + step / last * PLOT[0], TOP + (high - value) / (high - low) * PLOT[1]

        for mark in range(math.ceil(low / tick - 1e-9), math.floor(high / tick + 1e-9) + 1):
            value = mark * tick
            _line(draw, [at(0, value), at(last, value)], GRID, 1)
            _write(draw, (left - 44, at(0, value)[1] - 8), f"{100 * value:.0f} %", 13, FAINT)
        for step in range(0, last + 1, 1 if last <= 12 else 4):
            _write(draw, (at(step, low)[0] - 4, TOP + PLOT[1] + 8), str(step), 13, FAINT)
        _write(draw, (left + PLOT[0] / 2 - 34, TOP + PLOT[1] + 30), "requests", 14, FAINT)
        for method, colour in zip(methods, _colours(len(methods)), strict=True):
            by_seed: dict[str, dict[int, float]] = {}
            for row in rows:
                if row["method"] == method:
                    by_seed.setdefault(row["seed"], {})[int(row["step"])] = float(row[name])
            if len(by_seed) > 1:
                for curve in by_seed.values():
                    _line(draw, [at(step, curve[step]) for step in sorted(curve)], _pale(colour), 1)
            shared = set.intersection(*(set(curve) for curve in by_seed.values()))
            mean = {step: sum(curve[step] for curve in by_seed.values()) / len(by_seed) for step in shared}
            points = [at(step, mean[step]) for step in sorted(mean)]
            _line(draw, points, colour, 3)
            for px, py in points:
                draw.ellipse([SCALE * (px - 3), SCALE * (py - 3), SCALE * (px + 3), SCALE * (py + 3)], fill=colour)
    return image.resize(size, Resampling.LANCZOS)


def _colours(count: int) -> list[tuple[int, int, int]]:
    return [PALETTE[i % len(PALETTE)] for i in range(count)]


def _pale(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (round(0.4 * c + 0.6 * 255) for c in colour)
    return red, green, blue


def _line(draw: ImageDraw, points: Sequence[tuple[float, float]], colour: tuple[int, int, int], width: int) -> None:
    if len(points) > 1:
        draw.line([(SCALE * px, SCALE * py) for px, py in points], fill=colour, width=SCALE * width, joint="curve")


def _write(draw: ImageDraw, at: tuple[float, float], text: str, size: int, colour: tuple[int, int, int] = INK) -> float:
    """Write text; returns its width."""
    from PIL import ImageFont

    font = ImageFont.load_default(SCALE * size)
    draw.text((SCALE * at[0], SCALE * at[1]), text, font=font, fill=colour)
    return draw.textlength(text, font=font) / SCALE


# -- the command --------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Forget twelve concepts in sequence, and measure after each.")
    p.add_argument("--method", action="append", help="only this method; repeatable (default: all)")
    p.add_argument("--preset", default="tuned")
    p.add_argument(
        "--seed", type=int, action="append", help="seed of order, fits and pictures; repeatable (default: 0)"
    )
    p.add_argument("--requests", type=int, default=len(REQUESTS), help="only the first N requests")
    p.add_argument("--count", type=int, default=COUNT, help="pictures per target and per category of the retain set")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--steps", type=int, default=SamplingSettings.steps, help="sampling steps while measuring")
    p.add_argument("--batch", type=int, default=SamplingSettings.batch, help="pictures per batch while measuring")
    p.add_argument("--precision", default=SamplingSettings.precision, help="while measuring: auto, float32 or bfloat16")
    p.add_argument("--out", type=Path, default=Path(__file__).with_name("continual.csv"))
    p.add_argument("--plot", type=Path, default=Path(__file__).parent.parent / "docs" / "continual.png")
    p.add_argument("--work", type=Path, help="folder to cache each step's patch and the unedited model's pictures")
    return p


def main(argv: Sequence[str] | None = None, load: Any = embedded) -> int:
    """Run the benchmark; returns 0, 1 if a sequence failed (the others still run), or 2 if nothing could run."""
    options = parser().parse_args(argv)
    try:
        return _main(options, load)
    except ForgetConceptError as error:
        print(error, file=sys.stderr)
        return 2


def _main(options: argparse.Namespace, load: Any) -> int:
    table = Table(options.out, COLUMNS, KEY)
    steps = min(options.requests, len(REQUESTS))
    methods, seeds = options.method or list(all_methods()), options.seed or [0]
    plans = [(method, seed) for seed in seeds for method in methods]
    todo = {
        plan: [step for step in range(steps + 1) if not table.has({"method": plan[0], "seed": plan[1], "step": step})]
        for plan in plans
    }
    failed = 0
    if any(todo.values()):
        model, probe, by = load(options.device)
        workspace = Workspace(options.work) if options.work else None
        sampling = SamplingSettings(options.steps, batch=options.batch, precision=options.precision)
        with RunProgress(sum(map(len, todo.values()))) as progress:
            cache: dict[int, SharedSampleCache] = {}
            for method, seed in plans:
                if not (wanted := todo[method, seed]):
                    continue
                if seed not in cache:
                    cache = {seed: SharedSampleCache(model, probe, sampling, workspace, by)}
                progress.name = f"{method} seed {seed}"
                try:
                    measure(
                        model,
                        probe,
                        (method, options.preset, seed),
                        wanted,
                        options.count,
                        cache[seed],
                        table,
                        progress,
                    )
                except ForgetConceptError as error:
                    failed += 1
                    progress.say(f"{progress.name}: {error}", wrong=True)
    if table.rows:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(table.rows).save(options.plot, optimize=True)
    return 1 if failed else 0


def measure(
    model: LatentDiffusion,
    probe: Any,
    plan: tuple[str, str, int],
    wanted: Sequence[int],
    count: int,
    cache: SharedSampleCache,
    table: Table,
    progress: RunProgress,
) -> None:
    """Fit one sequence and measure the wanted steps, one row each."""
    method, preset, seed = plan

    def measured(patches: tuple[tuple[Patch, float], ...], names: Sequence[str]) -> list[Evaluation]:
        targets = [EvaluationTarget(name, patches) for name in names]
        found = evaluate(
            model,
            probe,
            targets,
            count,
            seed,
            without=TARGETS,
            baselines=(UNEDITED,),
            progress=progress,
            cache=cache,
        )
        cache.release()
        return found

    if 0 in wanted:
        table.append(_row(method, seed, 0, measured((), TARGETS), 0.0, 0.0))
        progress.done()
    if not any(wanted):
        return
    sequence = RequestSequence(model, method, preset, seed, cache.workspace)
    if sequence.note:
        progress.say(f"{progress.name}: {sequence.note}")
    sequence.resume(min(step for step in wanted if step) - 1)
    while sequence.step < max(wanted):
        sequence.forward(progress)
        if sequence.step not in wanted:
            continue
        patch = sequence.history.patch
        found = measured(((patch, 1.0),), sequence.past)
        row = _row(method, seed, sequence.step, found, weight_drift(model.survey, patch).whole, sequence.seconds)
        table.append(row)
        progress.say(
            f"{progress.name} after {sequence.step}: UA {row['ua_all']:.3f} IRA {row['ira']:.3f} CRA {row['cra']:.3f} "
            f"drift {row['weight_drift']:.3f} in {row['seconds']:.1f} s"
        )
        progress.done()


if __name__ == "__main__":
    sys.exit(main())
