"""The one training loop: trainable deltas beside a frozen model, optimiser, progress, cancel, resuming, guards.

The deltas are added by forward hooks; the model's own weights are frozen and never written, so it comes back bit for
bit as it was on success, error and cancel alike, with every flag as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ..errors import ForgetConceptError, RequestError
from ..files.workspace import Workspace
from ..models.latent_diffusion import LatentDiffusion
from ..progress import Progress, ProgressEvent, report_progress
from .adapters import Trainable
from .frozen import frozen
from .gradients import project_step, restricted_gradient

__all__ = [
    "GRADIENTS",
    "OPTIMISERS",
    "Checkpoint",
    "Objective",
    "Term",
    "Terms",
    "TrainingReport",
    "TrainingSettings",
    "train",
]

Side = Literal["forget", "retain"]
GradientRule = Literal["sum", "restricted", "restricted_step"]
Optimiser = Literal["adamw", "sgd"]
SIDES: tuple[Side, Side] = ("forget", "retain")
GRADIENTS: tuple[GradientRule, ...] = ("sum", "restricted", "restricted_step")
OPTIMISERS: tuple[Optimiser, ...] = ("adamw", "sgd")
BACKTRACKS = 2  # times that a projected step is halved where it really raised a loss; see benchmarks/gradients.py


@dataclass(frozen=True)
class Term:
    """One part of a loss: ``weight · value`` (a scalar), and whether it is there to forget or to keep."""

    value: Tensor
    weight: float = 1.0
    side: Side = "forget"

    @property
    def weighted(self) -> Tensor:
        return self.weight * self.value


Terms = Mapping[str, Term]


class Objective(Protocol):
    """Makes the terms of a step, with the deltas attached and the model frozen.

    What it draws, it draws from its own generators: ``state`` is all that the next step depends on besides the deltas,
    and after ``restore`` of it the same steps follow.
    """

    def __call__(self, step: int) -> Terms: ...

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class TrainingSettings:
    """What the loop itself needs: ``steps``, the ``optimiser``'s ``lr`` and ``weight_decay``, a bound of the gradient's
    norm, and how the two sides' gradients become one.

    Weight decay acts on the deltas, so it pulls back to the base model, not to zero weights. ``gradient`` is ``"sum"``
    (plain), ``"restricted"`` (:func:`restricted_gradient` with ``alpha``) or ``"restricted_step"`` (that,
    and the step the optimiser then makes goes through :func:`project_step`, and is halved, twice at most,
    while one of the losses, worked out again on the same draws, is above what it was).
    """

    steps: int
    lr: float
    weight_decay: float = 0.0
    clip_norm: float | None = None
    optimiser: Optimiser = "adamw"
    gradient: GradientRule = "sum"
    alpha: float = 1.0


@dataclass(frozen=True)
class Checkpoint:
    """Where a training that is cut short is kept, and under which key it goes on; also every ``every`` steps."""

    workspace: Workspace
    key: str
    every: int = 100


@dataclass(frozen=True)
class TrainingReport:
    """What the loss's terms were, unweighted: means over the first and the last tenth of all steps."""

    steps: int
    first: Mapping[str, float]
    last: Mapping[str, float]


def train(
    model: LatentDiffusion,
    deltas: Trainable,
    objective: Objective,
    settings: TrainingSettings,
    progress: Progress | None = None,
    message: str = "training",
    checkpoint: Checkpoint | None = None,
) -> TrainingReport:
    """Minimise ``Σ weight · term`` over the deltas, in place.

    ``progress`` cancels by raising :class:`Cancelled`. With a ``checkpoint``, the progress made until then is saved,
    and the same call resumes from there to a bit-identical result on one device. Raises :class:`ForgetConceptError`
    where the loss or a gradient is not finite; no step is made then.
    """
    optimiser = _optimiser(deltas.parameters(), settings)
    with frozen(model.unet), deltas.attached():
        told = _restored(checkpoint, deltas, optimiser, objective)
        done = len(told)
        kept = objective.state() if checkpoint else {}
        whole = True  # whether what would be saved is the state after a whole step
        try:
            for step in range(done + 1, settings.steps + 1):
                value, terms, move = _gradients(deltas, objective, optimiser, settings, step)
                whole = False
                move()
                del move  # it holds on to the loss's graph
                if checkpoint is not None:
                    kept = objective.state()
                told.append(terms)
                whole = True
                if checkpoint is not None and step % checkpoint.every == 0 and step < settings.steps:
                    _save(checkpoint, deltas, optimiser, kept, told)
                report_progress(progress, ProgressEvent(step, settings.steps, value, terms, message))
        except BaseException:
            # broken off (Ctrl-C, out of memory) while parameters moved, the state is of no step: an earlier save stays
            if checkpoint is not None and told and whole:
                _save(checkpoint, deltas, optimiser, kept, told)
            raise
    if checkpoint is not None:
        checkpoint.workspace.remove("training", checkpoint.key)
    tenth = max(len(told) // 10, 1)
    return TrainingReport(settings.steps, _means(told[:tenth]), _means(told[-tenth:]))


def _optimiser(parameters: list[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    if settings.gradient not in GRADIENTS or settings.optimiser not in OPTIMISERS:
        raise RequestError(
            f"'gradient' must be one of {', '.join(GRADIENTS)} and 'optimiser' one of {', '.join(OPTIMISERS)}."
        )
    if settings.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def _gradients(
    deltas: Trainable,
    objective: Objective,
    optimiser: torch.optim.Optimizer,
    settings: TrainingSettings,
    step: int,
) -> tuple[float, dict[str, float], Callable[[], None]]:
    """The whole loss and its terms, unweighted, before a step, and the function that makes the step.

    Parameters and optimizer change in that function alone.
    """
    parameters = deltas.parameters()
    optimiser.zero_grad(set_to_none=True)
    drawn = objective.state() if settings.gradient == "restricted_step" else None
    terms = objective(step)
    loss = torch.stack([term.weighted for term in terms.values()]).sum()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise _diverged(step, "the loss", settings.lr)
    if not loss.requires_grad:
        raise ForgetConceptError("The loss does not depend on what is trained: choose other projections to train.")
    if settings.gradient == "sum":
        loss.backward()
        sides = None
    else:
        sides = _both_sides(terms, parameters, settings)
        for parameter, gradient in zip(parameters, restricted_gradient(*sides, settings.alpha), strict=True):
            parameter.grad = gradient
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = _norm(gradients)
    if not math.isfinite(norm):
        raise _diverged(step, "a gradient", settings.lr)
    if settings.clip_norm is not None and norm > settings.clip_norm:
        for gradient in gradients:
            gradient.mul_(settings.clip_norm / norm)

    def move() -> None:
        if sides is None or drawn is None:
            optimiser.step()
        else:
            was, change = _projected_step(optimiser, parameters, sides)
            _backtrack(objective, step, drawn, terms, sides, parameters, was, change)

    return value, {name: float(term.value.detach()) for name, term in terms.items()}, move


def _both_sides(
    terms: Terms, parameters: list[nn.Parameter], settings: TrainingSettings
) -> tuple[list[Tensor], list[Tensor]]:
    found = []
    for side in SIDES:
        parts = [term.weighted for term in terms.values() if term.side == side and term.value.requires_grad]
        if not parts:
            raise RequestError(
                f"The gradient rule '{settings.gradient}' sets forgetting against keeping, and this loss has no part "
                f"that is there to {side}: give both sides a weight above 0, or set 'gradient' to 'sum'."
            )
        gradients = torch.autograd.grad(
            torch.stack(parts).sum(), parameters, retain_graph=side == "forget", allow_unused=True
        )
        found.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)])
    return found[0], found[1]


@torch.no_grad()
def _projected_step(
    optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter], sides: tuple[list[Tensor], list[Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Make the step; returns the parameters as they were, and what was taken off them."""
    before = [parameter.detach().clone() for parameter in parameters]
    optimiser.step()
    made = [b - p for b, p in zip(before, parameters, strict=True)]
    change = project_step(made, *sides).step
    for parameter, was, taken in zip(parameters, before, change, strict=True):
        parameter.copy_(was - taken)
    return before, change


@torch.no_grad()
def _backtrack(
    objective: Objective,
    step: int,
    drawn: Mapping[str, Tensor],
    terms: Terms,
    sides: tuple[list[Tensor], list[Tensor]],
    parameters: list[nn.Parameter],
    before: Sequence[Tensor],
    change: Sequence[Tensor],
) -> None:
    """Halve a step that raised a loss of the very same draws, at most :data:`BACKTRACKS` times.

    Such a step falls to first order, so what raises a loss is its curvature, which a shorter step feels less. A loss
    without a gradient can only rise (what is kept, at the start), and is not asked.
    """
    asked = [
        side
        for side, gradients in zip(SIDES, sides, strict=True)
        if any(bool(gradient.any()) for gradient in gradients)
    ]
    held = {side: _of_side(terms, side) for side in asked}
    after = objective.state()
    for halvings in range(1, BACKTRACKS + 1):
        objective.restore(drawn)
        now = objective(step)
        if all(_of_side(now, side) <= value for side, value in held.items()):
            break
        for parameter, was, taken in zip(parameters, before, change, strict=True):
            parameter.copy_(was - taken * 0.5**halvings)
    objective.restore(after)


def _of_side(terms: Terms, side: Side) -> float:
    return float(torch.stack([term.weighted.detach() for term in terms.values() if term.side == side]).sum())


def _means(told: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for terms in told for name in terms)
    values = {name: [terms[name] for terms in told if name in terms] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


# -- a training cut short ------------------------------------------------------------------------------------------


def _save(
    checkpoint: Checkpoint,
    deltas: Trainable,
    optimiser: torch.optim.Optimizer,
    kept: Mapping[str, Tensor],
    told: Sequence[Mapping[str, float]],
) -> None:
    tensors: dict[str, Tensor] = {f"parameter.{i}": p for i, p in enumerate(deltas.parameters())}
    for i, values in optimiser.state_dict()["state"].items():
        # plain SGD has None for its momentum in some versions of torch
        known = {name: value for name, value in values.items() if value is not None}
        tensors |= {f"optimiser.{i}.{name}": torch.as_tensor(value) for name, value in known.items()}
    tensors |= {f"objective.{name}": value for name, value in kept.items()}
    tensors["done"] = torch.tensor(len(told))
    # by number, for a file does not keep its tensors' order, and the report lists the terms in theirs
    for i, name in enumerate(dict.fromkeys(name for terms in told for name in terms)):
        values = [terms.get(name, math.nan) for terms in told]
        tensors[f"told.{i}.{name}"] = torch.tensor(values, dtype=torch.float64)
    checkpoint.workspace.save("training", checkpoint.key, tensors)


@torch.no_grad()
def _restored(
    checkpoint: Checkpoint | None, deltas: Trainable, optimiser: torch.optim.Optimizer, objective: Objective
) -> list[dict[str, float]]:
    """The terms of the steps already made; deltas, optimiser and objective are then as they were after them."""
    found = None if checkpoint is None else checkpoint.workspace.load("training", checkpoint.key)
    if found is None:
        return []
    for i, parameter in enumerate(deltas.parameters()):
        parameter.copy_(found[f"parameter.{i}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in found.items():
        if name.startswith("optimiser."):
            _, number, what = name.split(".", 2)
            state.setdefault(int(number), {})[what] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    objective.restore({name[len("objective.") :]: t for name, t in found.items() if name.startswith("objective.")})
    told: list[dict[str, float]] = [{} for _ in range(int(found["done"]))]
    columns = sorted((name.split(".", 2)[1:] for name in found if name.startswith("told.")), key=lambda c: int(c[0]))
    for number, name in columns:
        for terms, value in zip(told, found[f"told.{number}.{name}"].tolist(), strict=True):
            if not math.isnan(value):  # a step without this term; no step is made on a loss that is not finite
                terms[name] = value
    return told


def _norm(gradients: Sequence[Tensor]) -> float:
    # one number fetched from the device, not one a matrix
    norms = [torch.linalg.vector_norm(g) for g in gradients]
    return float(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])))


def _diverged(step: int, what: str, lr: float) -> ForgetConceptError:
    return ForgetConceptError(
        f"The training broke down at step {step}: {what} is no longer a finite number. Use a lower learning rate than "
        f"{lr:g}, or run the model in full precision."
    )
