"""How often each loss really rose, under every gradient rule: `python benchmarks/gradients.py`.

After each step of a training both of its losses, of what is to be forgotten and of what is to be kept, are worked out
again on the same prompts, pictures, time steps and noise; a loss that is above what it was before the step rose.
Everything runs through the ordinary loop on the embedded model, and looking on changes nothing of it. A row is one
training; one that is there is not run again. The Markdown summary goes to the standard output.

- `method`: `forget_me_not` with its tuned settings, or `concept_ablation`: its terms alone (the concept's prediction
  moved to that of its replacement, what is kept held), which is the same objective without attention;
- `gradient`, `margin`, `backtracks`: the rule; the margin of a projected step (0: it may not rise to first order, no
  more), and how often it is halved at most where a loss rose all the same (each is a pass forward more);
- `lr`: AdamW's is the tuned preset's, a third and a tenth of it; SGD's those times a factor for each method that makes
  its mean step over a training as long as AdamW's (`step_norm`) at `sum`, where a step is `lr · gradient_norm`;
- `forget_rose`, `retain_rose`, `either_rose`, `conflicts`: shares of the `steps`; a conflict is an angle above 90°
  between the two losses' gradients;
- `forget_before`, `forget_after`, `retain_after`: means over four batches that no training saw, before and after it
  (`retain` starts at zero: what is kept is the base model's own prediction).
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
# a projected step as it is, without going back, and without a margin either
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
class Watched:
    """One step: both losses before and after it, ``g_f·g_r``, ``‖g_f + g_r‖`` and the length of the step."""

    before: Mapping[str, float]
    after: Mapping[str, float]
    cross: float
    gradient_norm: float
    step_norm: float


class Watch:
    """An objective that looks back: each step's losses again, on the same draws, when the next one is asked for.

    What the wrapped objective draws, and so the training, is what it would be without. :meth:`look_back` closes the
    last step.
    """

    def __init__(self, inner: ForgetMeNotObjective) -> None:
        self.inner = inner
        self.steps: list[Watched] = []
        self.held_out: list[dict[str, float]] = []
        self._last: tuple[dict[str, Tensor], int, dict[str, float], tuple[float, float], list[Tensor]] | None = None

    def __call__(self, step: int) -> Terms:
        if not torch.is_grad_enabled():  # the loop itself looks whether a step raised a loss
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
        """The last step's losses with the deltas as they are now."""
        if self._last is None:
            return
        state, step, before, (cross, norm), weights = self._last
        self._last = None
        now = self.inner.deltas.parameters()
        moved = math.sqrt(sum(float((a - b.detach()).square().sum()) for a, b in zip(weights, now, strict=True)))
        self.steps.append(Watched(before, self._again(state, step), cross, norm, moved))

    def measure(self) -> None:
        """Both losses on batches of their own."""
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


class WatchedForgetMeNot(ForgetMeNot):
    """Forget-Me-Not under a :class:`Watch`; the pictures of one concept and seed are drawn once for all trainings."""

    def __init__(self, pictures: dict[Any, Any]) -> None:
        self.pictures = pictures
        self.watch: Watch | None = None

    def picture(self, batches: Any, settings: Any, inputs: Any, progress: Any) -> None:
        key = tuple(target.text for target in batches.targets), batches.generator.initial_seed()
        if key not in self.pictures:
            super().picture(batches, settings, inputs, progress)
            self.pictures[key] = dict(batches.pools), batches.generator.get_state()
        batches.pools = dict(self.pictures[key][0])
        batches.generator.set_state(self.pictures[key][1])

    def objective(self, *given: Any) -> Any:
        self.watch = Watch(super().objective(*given))
        return self.watch


@contextlib.contextmanager
def projecting(margin: float, backtracks: int) -> Iterator[None]:
    """The loop's projected steps have this margin, and go back so often, inside a ``with`` block."""
    with (
        mock.patch.object(training, "project_step", functools.partial(project_step, margin=margin)),
        mock.patch.object(training, "BACKTRACKS", backtracks),
    ):
        yield


def watched(
    model: LatentDiffusion,
    concept: Concept,
    settings: ForgetMeNotSettings,
    seed: int,
    margin: float = MARGIN,
    backtracks: int = BACKTRACKS,
    pictures: dict[Any, Any] | None = None,
) -> Watch:
    """A whole training with every step looked at; all others of the concept's category are to be kept."""
    others = tuple(word.name for word in CATEGORIES[concept.kind] if word.name != concept.name)
    method = WatchedForgetMeNot({} if pictures is None else pictures)
    with projecting(margin, backtracks):
        request = ForgetRequest((concept,), preserve=others, method=method.id, seed=seed)
        method.train_patch(model, request, settings, None, Inputs())
    watch = method.watch
    assert watch is not None
    with frozen(model.unet), watch.inner.deltas.attached():
        watch.look_back()
        watch.measure()
    return watch


def row_of(watch: Watch, key: Mapping[str, Any]) -> dict[str, Any]:
    """The table's row of a training."""
    n = len(watch.steps)
    rose = [[w.after[side] > w.before[side] for side in SIDES] for w in watch.steps]
    before, after = watch.held_out
    return {
        **key,
        "forget_rose": sum(r[0] for r in rose) / n,
        "retain_rose": sum(r[1] for r in rose) / n,
        "either_rose": sum(any(r) for r in rose) / n,
        "conflicts": sum(w.cross < 0 for w in watch.steps) / n,
        "step_norm": sum(w.step_norm for w in watch.steps) / n,
        "gradient_norm": sum(w.gradient_norm for w in watch.steps) / n,
        "forget_before": before["forget"],
        "forget_after": after["forget"],
        "retain_after": after["retain"],
    }


def summary(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: shares over all trainings of a rule, and how often restricted steps raised a loss against the sum."""
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
                f"{added:.1%} with the sum: {share / added:.2f} of it."
            )
    return "\n".join(lines)


def _cells(gradient: str, margin: float | None, backtracks: int | None) -> tuple[str, str, str]:
    return gradient, "" if margin is None else f"{margin:.5g}", "" if backtracks is None else str(backtracks)


def planned(options: argparse.Namespace) -> list[tuple[dict[str, Any], Concept]]:
    """Every run's key, and its concept."""
    found = []
    for method in options.method or SETTINGS:
        for multiple in LEARNING_RATES:
            for optimiser in options.optimiser or OPTIMISERS:
                lr = multiple * (SGD_FACTOR[method] if optimiser == "sgd" else 1.0)
                for rule in RULES:
                    if rule[2] == 0 and multiple != LEARNING_RATES[0]:
                        continue  # at the default learning rate alone: they show what margin and halving are for
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
    parser.add_argument("--method", action="append", choices=list(SETTINGS), help="only these")
    parser.add_argument("--optimiser", action="append", choices=OPTIMISERS, help="only these")
    names = [concept.name for concept in CONCEPTS]
    parser.add_argument("--concept", action="append", choices=names, help="only these")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="at most so many new trainings")
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
        table.append(row_of(watched(model, concept, settings, options.seed, *how, pictures), key))
    print(summary(table.rows))


if __name__ == "__main__":
    main()
