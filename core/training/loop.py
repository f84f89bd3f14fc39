"""The training loop of all trained methods: optimizer, progress, cancellation, checkpoints, divergence checks.

Deltas are added by forward hooks; the model's own weights are frozen and never written. The model is restored
bit-exactly on success, error and cancellation, with every flag as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
BACKTRACKS = 2  # how often a projected step that raised a loss is halved; see benchmarks/gradients.py


@dataclass(frozen=True)
class Term:
    """One term of a loss, ``weight · value``.

    Args:
        value: A scalar.
        weight: Its weight.
        side: Whether the term makes the model forget, or retain what it knows.
    """

    value: Tensor
    weight: float = 1.0
    side: Side = "forget"

    @property
    def weighted(self) -> Tensor:
        return self.weight * self.value


Terms = Mapping[str, Term]


class Objective(Protocol):
    """Computes the terms of a step, with the deltas attached and the model frozen.

    Its random numbers come from its own generators. ``state`` holds everything that the next step depends on besides
    the deltas, so the same steps follow after ``restore``.
    """

    def __call__(self, step: int) -> Terms: ...

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of the loop.

    Args:
        steps: Training steps.
        lr: Learning rate.
        weight_decay: Weight decay of the deltas, which pulls towards the base model, not towards zero weights.
        clip_norm: Maximum norm of the gradient; ``None``: not clipped.
        optimiser: ``"adamw"`` or ``"sgd"``.
        gradient: How the gradients of both sides are combined. ``"sum"``: added up. ``"restricted"``:
            :func:`restricted_gradient` with ``alpha``. ``"restricted_step"`` also projects the optimizer's actual
            update with :func:`project_step`, and halves it, at most twice, while one of the losses, computed again on
            the same draws, is higher than before.
        alpha: Weight of the retain side in :func:`restricted_gradient`.
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
    """Where an interrupted training is saved.

    Args:
        workspace: The folder.
        key: Identifies the training: a hash of everything that it depends on.
        every: Steps from one periodic save to the next.
    """

    workspace: Workspace
    key: str
    every: int = 100


@dataclass(frozen=True)
class TrainingReport:
    """The unweighted terms of the loss, averaged over the first and over the last tenth of all steps."""

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
    """Minimize ``Σ weight · term`` over the deltas, in place.

    Args:
        model: The base model, which stays frozen.
        deltas: What is trained.
        objective: Computes the terms of each step.
        settings: Settings of the loop.
        progress: Called with every step; may raise :class:`Cancelled`.
        message: What progress events say is being done.
        checkpoint: If given, an interrupted training is saved there, and the same call resumes it to a bit-identical
            result on the same device.

    Returns:
        The terms at the beginning and at the end.

    Raises:
        ForgetConceptError: The loss or a gradient is not finite, in which case the step is not made, or the loss does
            not depend on the deltas.
        RequestError: The gradient rule needs terms of both sides and one side has none.
    """
    optimiser = _optimiser(deltas.parameters(), settings)
    with frozen(model.unet), deltas.attached():
        history = _restore(checkpoint, deltas, optimiser, objective, settings)
        done = len(history)
        state = objective.state() if checkpoint else {}
        consistent = True  # whether parameters, optimizer and `state` belong to the same step
        value: float | None = None
        try:
            report_progress(progress, ProgressEvent(done, settings.steps, message=message))
            for step in range(done + 1, settings.steps + 1):
                last = ProgressEvent(step - 1, settings.steps, value, message=message)
                look = partial(report_progress, progress, last)
                value, terms, update = _gradients(deltas, objective, optimiser, settings, step, look)
                consistent = False
                update()
                del update  # it holds a reference to the loss's graph
                if checkpoint is not None:
                    state = objective.state()
                history.append(terms)
                consistent = True
                if checkpoint is not None and step % checkpoint.every == 0 and step < settings.steps:
                    _save(checkpoint, deltas, optimiser, state, history)
                report_progress(progress, ProgressEvent(step, settings.steps, value, terms, message))
        except BaseException:
            # interrupted in the middle of an update (Ctrl-C, out of memory): keep the previous save
            if checkpoint is not None and history and consistent:
                _save(checkpoint, deltas, optimiser, state, history)
            raise
    if checkpoint is not None:
        checkpoint.workspace.remove("training", checkpoint.key)
    tenth = max(len(history) // 10, 1)
    return TrainingReport(settings.steps, _means(history[:tenth]), _means(history[-tenth:]))


def _optimiser(parameters: list[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    if settings.gradient not in GRADIENTS or settings.optimiser not in OPTIMISERS:
        raise RequestError(
            f"'gradient' must be one of {', '.join(GRADIENTS)} and 'optimiser' one of {', '.join(OPTIMISERS)}, not "
            f"'{settings.gradient}' and '{settings.optimiser}'."
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
    look: Callable[[], None],
) -> tuple[float, dict[str, float], Callable[[], None]]:
    """Compute the gradients of a step.

    ``look`` is called between the forward and the backward pass, each of which may take a second; it may cancel.

    Returns:
        The loss, its unweighted terms, and the function that makes the update; only that function changes parameters
        and optimizer.
    """
    parameters = deltas.parameters()
    optimiser.zero_grad(set_to_none=True)
    drawn = objective.state() if settings.gradient == "restricted_step" else None
    terms = objective(step)
    look()
    loss = torch.stack([term.weighted for term in terms.values()]).sum()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise _diverged(step, "the loss", settings.lr)
    if not loss.requires_grad:
        raise ForgetConceptError("The loss does not depend on the trained parameters: choose other projections.")
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

    def update() -> None:
        if sides is None or drawn is None:
            optimiser.step()
        else:
            before, change = _projected_step(optimiser, parameters, sides)
            _backtrack(objective, step, drawn, terms, sides, parameters, before, change)

    return value, {name: float(term.value.detach()) for name, term in terms.items()}, update


def _both_sides(
    terms: Terms, parameters: list[nn.Parameter], settings: TrainingSettings
) -> tuple[list[Tensor], list[Tensor]]:
    found = []
    for side in SIDES:
        parts = [term.weighted for term in terms.values() if term.side == side and term.value.requires_grad]
        if not parts:
            raise RequestError(
                f"The gradient rule '{settings.gradient}' balances forgetting and retaining, and this loss has no term "
                f"to {side}: give both sides a weight above 0, or set 'gradient' to 'sum'."
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
    """Make a projected update; returns the parameters before it, and the step that was subtracted from them."""
    before = [parameter.detach().clone() for parameter in parameters]
    optimiser.step()
    proposed = [b - p for b, p in zip(before, parameters, strict=True)]
    change = project_step(proposed, *sides).step
    for parameter, start, delta in zip(parameters, before, change, strict=True):
        parameter.copy_(start - delta)
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
    """Halve a step that raised a loss on the same draws, at most :data:`BACKTRACKS` times.

    A projected step descends to first order, so only curvature can raise a loss, and it affects a shorter step less. A
    side with zero gradient (the retain side, at the start) can only rise and is not checked.
    """
    limits = {
        side: _side_loss(terms, side)
        for side, gradients in zip(SIDES, sides, strict=True)
        if any(bool(gradient.any()) for gradient in gradients)
    }
    after = objective.state()
    for halvings in range(1, BACKTRACKS + 1):
        objective.restore(drawn)
        now = objective(step)
        if all(_side_loss(now, side) <= limit for side, limit in limits.items()):
            break
        for parameter, start, delta in zip(parameters, before, change, strict=True):
            parameter.copy_(start - delta * 0.5**halvings)
    objective.restore(after)


def _side_loss(terms: Terms, side: Side) -> float:
    return float(torch.stack([term.weighted.detach() for term in terms.values() if term.side == side]).sum())


def _means(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for terms in history for name in terms)
    values = {name: [terms[name] for terms in history if name in terms] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


# -- checkpoints ---------------------------------------------------------------------------------------------------


def _save(
    checkpoint: Checkpoint,
    deltas: Trainable,
    optimiser: torch.optim.Optimizer,
    state: Mapping[str, Tensor],
    history: Sequence[Mapping[str, float]],
) -> None:
    tensors: dict[str, Tensor] = {f"parameter.{i}": p for i, p in enumerate(deltas.parameters())}
    for i, values in optimiser.state_dict()["state"].items():
        # some versions of torch store None as the momentum of plain SGD
        known = {name: value for name, value in values.items() if value is not None}
        tensors |= {f"optimiser.{i}.{name}": torch.as_tensor(value) for name, value in known.items()}
    tensors |= {f"objective.{name}": value for name, value in state.items()}
    tensors["done"] = torch.tensor(len(history))
    # numbered, because a file does not preserve the order of its tensors
    for i, name in enumerate(dict.fromkeys(name for terms in history for name in terms)):
        values = [terms.get(name, math.nan) for terms in history]
        tensors[f"told.{i}.{name}"] = torch.tensor(values, dtype=torch.float64)
    checkpoint.workspace.save("training", checkpoint.key, tensors)


@torch.no_grad()
def _restore(
    checkpoint: Checkpoint | None,
    deltas: Trainable,
    optimiser: torch.optim.Optimizer,
    objective: Objective,
    settings: TrainingSettings,
) -> list[dict[str, float]]:
    """Restore deltas, optimizer and objective from a checkpoint; returns the terms of the steps already made.

    A checkpoint that does not fit is deleted, with a warning, and the training begins anew.
    """
    found = None if checkpoint is None else checkpoint.workspace.load("training", checkpoint.key)
    if checkpoint is None or found is None:
        return []
    parameters, drawn = deltas.parameters(), objective.state()
    before = [parameter.detach().clone() for parameter in parameters]
    fresh = optimiser.state_dict()
    try:
        history = _history(found, settings.steps)
        state = _optimiser_state(found, parameters, settings, len(history))
        values = [found[f"parameter.{i}"] for i in range(len(parameters))]
        if sum(name.startswith("parameter.") for name in found) != len(values) or any(
            value.shape != parameter.shape for value, parameter in zip(values, parameters, strict=True)
        ):
            raise ValueError("its parameters have other shapes")
        resumed = {name: found[f"objective.{name}"] for name in drawn}
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
        optimiser.load_state_dict({"state": state, "param_groups": fresh["param_groups"]})
        objective.restore(resumed)
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError, OverflowError) as error:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
        optimiser.load_state_dict(fresh)
        objective.restore(drawn)
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        checkpoint.workspace.discard("training", checkpoint.key, why)
        return []
    return history


def _history(found: Mapping[str, Tensor], steps: int) -> list[dict[str, float]]:
    """The terms of every step made; raises :class:`ValueError` and the like where they are malformed."""
    done = int(found["done"])
    if not 0 < done <= steps:
        raise ValueError(f"it says that {done} of {steps} steps are made")
    history: list[dict[str, float]] = [{} for _ in range(done)]
    columns = sorted((name.split(".", 2)[1:] for name in found if name.startswith("told.")), key=lambda c: int(c[0]))
    for number, name in columns:
        for terms, value in zip(history, found[f"told.{number}.{name}"].tolist(), strict=True):
            if not math.isnan(value):  # NaN marks a step without this term; losses of steps made are finite
                terms[name] = value
    return history


# what torch's optimizers keep of a parameter of any shape, beside what has the parameter's own
_OPTIMISER_FIELDS = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "sgd": ()}


def _optimiser_state(
    found: Mapping[str, Tensor], parameters: Sequence[Tensor], settings: TrainingSettings, done: int
) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    kept = {int(name.split(".")[1]) for name in found if name.startswith("optimiser.")}
    fields = _OPTIMISER_FIELDS[settings.optimiser]
    if bool(kept) != bool(fields):
        raise ValueError("the optimizer's state is missing, or of another one")
    # a parameter that no gradient reached has no state
    for i in sorted(kept):
        parameter = parameters[i]
        state[i] = {name: found[f"optimiser.{i}.{name}"] for name in fields}
        for name, value in state[i].items():
            if value.shape != (() if name == "step" else parameter.shape) or (name == "step" and int(value) != done):
                raise ValueError(f"the optimizer's {name} is of another training")
    return state


def _norm(gradients: Sequence[Tensor]) -> float:
    # one transfer from the device, not one per matrix
    norms = [torch.linalg.vector_norm(g) for g in gradients]
    return float(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])))


def _diverged(step: int, what: str, lr: float) -> ForgetConceptError:
    return ForgetConceptError(
        f"Training diverged at step {step}: {what} is not finite. Use a lower learning rate than "
        f"{lr:g}, or run the model in full precision."
    )
