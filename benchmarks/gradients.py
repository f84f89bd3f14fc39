"""How often a training step increases either loss, for every gradient rule: `python benchmarks/gradients.py`.

After each step, the forget loss and the retain loss are computed again on the same prompts, pictures, time steps and
noise; a loss rose if it is above its value before the step. Everything runs through the ordinary training loop on the
embedded model, and observing does not change it. A row is one training; existing rows are not run again. The Markdown
summary goes to standard output.

- `method`: `forget_me_not` with its tuned settings, or `concept_ablation`, the same objective without attention terms
  (the concept's prediction moves to that of its replacement, the retain set's stays);
- `gradient`, `margin`, `backtracks`: the rule; the margin of a projected step (0: no increase to first order, no more),
  and how often it is halved at most while a loss still rises (each halving costs a forward pass);
- `lr`: for AdamW that of the tuned preset, a third and a tenth of it; for SGD these times a factor per method, chosen
  so that the mean `step_norm` of `sum`, where a step is `lr · gradient_norm`, matches AdamW's;
- `forget_rose`, `retain_rose`, `either_rose`, `conflicts`: shares of the `steps`; a conflict is an angle above 90°
  between the gradients of the two losses;
- `forget_before`, `forget_after`, `retain_after`: means over four held-out batches, before and after training (`retain`
  starts at zero, because its target is the base model's own prediction).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import Table
from torch import Tensor

from forget_concept.core import mini
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.forget_me_not import ForgetMeNot, ForgetMeNotObjective, ForgetMeNotSettings
from forget_concept.core.mini.vocabulary import CATEGORIES
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.training import loop as training
from forget_concept.core.training.frozen import frozen
from forget_concept.core.training.gradients import MARGIN, inner_products, project_step
from forget_concept.core.training.loop import BACKTRACKS, SIDES, Terms

CONCEPTS = (Concept("star", "object", "circle"), Concept("neon", "style", "sketch"))
# for projected steps: as configured by default, without backtracking, and also without a margin
RULES: tuple[tuple[str, float | None, int | None], ...] = (
    ("sum", None, None),
    ("restricted", None, None),
    ("restricted_step", MARGIN, BACKTRACKS),
    ("restricted_step", MARGIN, 0),
    ("restricted_step", 0.0, 0),
)
OPTIMISERS = ("adamw", "sgd")
TUNED = ForgetMeNot.presets["tuned"]
LEARNING_RATES = (TUNED.lr, TUNED.lr / 3, TUNED.lr / 10)  # the default first
SETTINGS = {"forget_me_not": TUNED, "concept_ablation": replace(TUNED, attention_weight=0.0)}
SGD_FACTOR = {"forget_me_not": 3.5, "concept_ablation": 500.0}
HELD_OUT = 4

KEY = ["method", "gradient", "margin", "backtracks", "optimiser", "lr", "concept", "seed", "steps"]
SHARES = ["forget_rose", "retain_rose", "either_rose", "conflicts"]
LOSSES = ["forget_before", "forget_after", "retain_after"]
GROUP = ["method", "optimiser", "lr", "gradient", "margin", "backtracks"]
COLUMNS = [*KEY, *SHARES, "step_norm", "gradient_norm", *LOSSES]


@dataclass(frozen=True)
class ObservedStep:
    """One observed step: both losses before and after it, ``g_f·g_r``, ``‖g_f + g_r‖`` and the norm of the step."""

    before: Mapping[str, float]
    after: Mapping[str, float]
    cross: float
    gradient_norm: float
    step_norm: float


class StepObserver:
    """Wraps an objective; before each step it computes the previous step's losses again, on the same random draws.

    The wrapped objective draws the same random numbers as without it, so the training does not change.
    :meth:`look_back` completes the last step.
    """

    def __init__(self, inner: ForgetMeNotObjective) -> None:
        self.inner = inner
        self.steps: list[ObservedStep] = []
        self.held_out: list[dict[str, float]] = []
        self._last: tuple[dict[str, Tensor], int, dict[str, float], tuple[float, float], list[Tensor]] | None = None

    def __call__(self, step: int) -> Terms:
        if not torch.is_grad_enabled():  # the loop's own check whether a step raised a loss
            return self.inner(step)
        self.look_back()
        if not self.held_out:
            self.measure()
        state = self.inner.state()
        terms = self.inner(step)
        parameters = self.inner.deltas.parameters()
        gradients = [
            torch.autograd.grad(_side(terms, side), parameters, retain_graph=True, allow_unused=True) for side in SIDES
        ]
        p = inner_products(*gradients)
        found = p.cross, math.sqrt(max(p.forget + p.retain + 2 * p.cross, 0.0))
        self._last = state, step, _losses(terms), found, [w.detach().clone() for w in parameters]
        return terms

    def look_back(self) -> None:
        """Compute the last step's losses with the current deltas."""
        if self._last is None:
            return
        state, step, before, (cross, norm), weights = self._last
        self._last = None
        now = self.inner.deltas.parameters()
        moved = math.sqrt(sum(float((a - b.detach()).square().sum()) for a, b in zip(weights, now, strict=True)))
        self.steps.append(ObservedStep(before, self._again(state, step), cross, norm, moved))

    def measure(self) -> None:
        """Compute both losses on held-out batches."""
        totals = dict.fromkeys(SIDES, 0.0)
        for i in range(HELD_OUT):
            fresh = torch.Generator("cpu").manual_seed(10_000 + i).get_state()
            state = {**self.inner.state(), "generator": fresh, "turn": torch.tensor([]), "kept_turn": torch.tensor([])}
            for side, value in self._again(state, 1).items():
                totals[side] += value / HELD_OUT
        self.held_out.append(totals)

    def _again(self, state: Mapping[str, Tensor], step: int) -> dict[str, float]:
        kept = self.inner.state()
        self.inner.restore(state)
        with torch.no_grad():
            found = _losses(self.inner(step))
        self.inner.restore(kept)
        return found

    def state(self) -> dict[str, Tensor]:
        return self.inner.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.inner.restore(state)


def _side(terms: Terms, side: str) -> Tensor:
    return torch.stack([term.weighted for term in terms.values() if term.side == side]).sum()


def _losses(terms: Terms) -> dict[str, float]:
    return {side: float(_side(terms, side).detach()) for side in SIDES}


class ObservedForgetMeNot(ForgetMeNot):
    """Forget-Me-Not under a :class:`StepObserver`; all trainings of one concept and seed share their pictures."""

    def __init__(self, pictures: dict[Any, Any]) -> None:
        self.pictures = pictures
        self.observer: StepObserver | None = None

    def fill_pools(self, batches: Any, settings: Any, inputs: Any, progress: Any) -> None:
        key = tuple(target.text for target in batches.targets), batches.generator.initial_seed()
        if key not in self.pictures:
            super().fill_pools(batches, settings, inputs, progress)
            self.pictures[key] = dict(batches.pools), batches.generator.get_state()
        batches.pools = dict(self.pictures[key][0])
        batches.generator.set_state(self.pictures[key][1])

    def objective(self, *given: Any) -> Any:
        self.observer = StepObserver(super().objective(*given))
        return self.observer


@contextlib.contextmanager
def projecting(margin: float, backtracks: int) -> Iterator[None]:
    """Set margin and maximum number of backtracks of the loop's projected steps inside a ``with`` block."""
    with (
        mock.patch.object(training, "project_step", functools.partial(project_step, margin=margin)),
        mock.patch.object(training, "BACKTRACKS", backtracks),
    ):
        yield


def observe(
    model: LatentDiffusion,
    concept: Concept,
    settings: ForgetMeNotSettings,
    seed: int,
    margin: float = MARGIN,
    backtracks: int = BACKTRACKS,
    pictures: dict[Any, Any] | None = None,
) -> StepObserver:
    """Run a whole training and observe every step; the retain set is the rest of the concept's category."""
    others = tuple(word.name for word in CATEGORIES[concept.kind] if word.name != concept.name)
    method = ObservedForgetMeNot({} if pictures is None else pictures)
    with projecting(margin, backtracks):
        request = ForgetRequest((concept,), preserve=others, method=method.id, seed=seed)
        method.train_patch(model, request, settings, None, Inputs())
    observer = method.observer
    assert observer is not None
    with frozen(model.unet), observer.inner.deltas.attached():
        observer.look_back()
        observer.measure()
    return observer


def row_of(observer: StepObserver, key: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a training."""
    n = len(observer.steps)
    rose = [[w.after[side] > w.before[side] for side in SIDES] for w in observer.steps]
    before, after = observer.held_out
    return {
        **key,
        "forget_rose": sum(r[0] for r in rose) / n,
        "retain_rose": sum(r[1] for r in rose) / n,
        "either_rose": sum(any(r) for r in rose) / n,
        "conflicts": sum(w.cross < 0 for w in observer.steps) / n,
        "step_norm": sum(w.step_norm for w in observer.steps) / n,
        "gradient_norm": sum(w.gradient_norm for w in observer.steps) / n,
        "forget_before": before["forget"],
        "forget_after": after["forget"],
        "retain_after": after["retain"],
    }


def summary(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown table: shares over all trainings of a rule, and how often restricted steps raised a loss vs. ``sum``."""
    lines = [
        "| method | optimiser | lr | rule | steps | forget rose | retain rose | either rose | conflicts | step "
        "| forget loss, before → after | retain loss after |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in GROUP), []).append(row)
    order = {_cells(*rule): i for i, rule in enumerate(RULES)}
    either: dict[tuple[str, ...], float] = {}
    for key in sorted(groups, key=lambda k: (k[0], k[1], float(k[2]), order.get(k[3:], len(order)), k[4:])):
        method, optimiser, lr, gradient, margin, backtracks = key
        steps = sum(int(row["steps"]) for row in groups[key])

        def mean(name: str, of: Sequence[Mapping[str, str]] = groups[key], steps: int = steps) -> float:
            return sum(float(row[name]) * int(row["steps"]) for row in of) / steps

        either[key] = mean("either_rose")
        rule = f"{gradient}, margin {margin}, halved {backtracks} times" if margin else gradient
        shares = " | ".join(f"{mean(name):.1%}" for name in SHARES)
        losses = f"{mean('forget_before'):.4g} → {mean('forget_after'):.4g} | {mean('retain_after'):.2e}"
        lines.append(
            f"| {method} | {optimiser} | {lr} | {rule} | {steps} | {shares} | {mean('step_norm'):.3g} | {losses} |"
        )
    lines.append("")
    for (method, optimiser, lr, gradient, margin, backtracks), share in either.items():
        added = either.get((method, optimiser, lr, "sum", "", ""))
        if gradient == "restricted_step" and added:
            lines.append(
                f"- {method}, {optimiser} at {lr}, margin {margin}, halved {backtracks} times: "
                f"a loss rose in {share:.1%} of the steps against "
                f"{added:.1%} with the sum: {share / added:.2f} times as often."
            )
    return "\n".join(lines)


def _cells(gradient: str, margin: float | None, backtracks: int | None) -> tuple[str, str, str]:
    return gradient, "" if margin is None else f"{margin:.5g}", "" if backtracks is None else str(backtracks)


def planned(options: argparse.Namespace) -> list[tuple[dict[str, Any], Concept]]:
    """The key and the concept of every run."""
    found = []
    for method in options.method or SETTINGS:
        for multiple in LEARNING_RATES:
            for optimiser in options.optimiser or OPTIMISERS:
                lr = multiple * (SGD_FACTOR[method] if optimiser == "sgd" else 1.0)
                for rule in RULES:
                    if rule[2] == 0 and multiple != LEARNING_RATES[0]:
                        continue  # only at the default learning rate: they show the effect of margin and backtracking
                    for concept in CONCEPTS:
                        if concept.name not in (options.concept or [concept.name]):
                            continue
                        values = (
                            *(method, *_cells(*rule), optimiser, f"{lr:.5g}"),
                            *(concept.name, options.seed, options.steps),
                        )
                        found.append((dict(zip(KEY, values, strict=True)), concept))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", action="append", choices=list(SETTINGS), help="only this method; repeatable")
    parser.add_argument("--optimiser", action="append", choices=OPTIMISERS, help="only this optimiser; repeatable")
    names = [concept.name for concept in CONCEPTS]
    parser.add_argument("--concept", action="append", choices=names, help="only this concept; repeatable")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="run at most N new trainings")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    table = Table(options.out, COLUMNS, KEY)
    wanted = [(key, concept) for key, concept in planned(options) if not table.has(key)][: options.limit]
    model, pictures = mini.load() if wanted else None, {}
    for i, (key, concept) in enumerate(wanted, 1):
        print(f"{i}/{len(wanted)}", *key.values(), file=sys.stderr, flush=True)
        settings = replace(
            SETTINGS[key["method"]],
            steps=options.steps,
            lr=float(key["lr"]),
            optimiser=key["optimiser"],
            gradient=key["gradient"],
        )
        how = (float(key["margin"]), int(key["backtracks"])) if key["margin"] else (MARGIN, BACKTRACKS)
        table.append(row_of(observe(model, concept, settings, options.seed, *how, pictures), key))
    print(summary(table.rows))


if __name__ == "__main__":
    main()
