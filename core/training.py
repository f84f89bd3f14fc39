"""The one training loop: trainable deltas beside a borrowed model, its optimiser, progress, cancel and guards.

The deltas are added by forward hooks; the model's own weights are frozen and never written, so it comes back bit for
bit as it was on success, error and cancel alike, with every flag as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from .diffusion import LatentDiffusion
from .errors import Cancelled, ForgetConceptError, ModelError
from .patch import LowRank
from .progress import Progress, ProgressEvent, report

__all__ = ["Cancelled", "Deltas", "Progress", "ProgressEvent", "TrainingSettings", "borrowed", "train"]

Terms = Mapping[str, tuple[float, Tensor]]


@contextmanager
def borrowed(*modules: nn.Module) -> Iterator[None]:
    """Modules frozen and in evaluation mode for the length of a ``with`` block; every flag is given back as it was.

    Gradients are on inside, even where a host has turned them off (ComfyUI runs everything in inference mode).
    """
    parameters = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for parameter, trainable in parameters:
                if trainable:  # asked first: an inference tensor takes no flag, and has none
                    parameter.requires_grad_(False)
            for part, _ in modes:
                part.training = False
            yield
    finally:
        for parameter, trainable in parameters:
            if parameter.requires_grad != trainable:
                parameter.requires_grad_(trainable)
        for part, mode in modes:
            part.training = mode


class Deltas:
    """Trainable changes of some projections, attached by forward hooks: ``up @ down`` each, or one dense matrix each.

    ``keys`` are canonical (``<site>.to_k``). With a ``rank``, ``down`` starts at random (drawn on the CPU from
    ``generator``, uniform within ``1/√d_in``) and ``up`` at zero; with ``rank=None`` the dense delta starts at zero:
    either way nothing is changed yet. Parameters are fp32 on the layer's device. ``enabled = False`` shows the base
    model.
    """

    def __init__(
        self, model: LatentDiffusion, keys: Sequence[str], rank: int | None, generator: torch.Generator
    ) -> None:
        self.enabled = True
        self.rank = rank
        self._parts: dict[str, tuple[nn.Parameter, ...]] = {}
        self._hooks: list[RemovableHandle] = []
        self._linears = {key: model.survey.linear(key) for key in keys}
        if not self._linears:
            raise ModelError("There is nothing to train: no projection was chosen.")
        for key, linear in self._linears.items():
            d_out, d_in = linear.weight.shape
            device = linear.weight.device
            if rank is None:
                self._parts[key] = (nn.Parameter(torch.zeros(d_out, d_in, device=device)),)
                continue
            r = min(rank, d_out, d_in)
            down = (torch.rand(r, d_in, generator=generator) * 2 - 1) / math.sqrt(d_in)
            self._parts[key] = (
                nn.Parameter(torch.zeros(d_out, r, device=device)),
                nn.Parameter(down.to(device)),
            )

    @contextmanager
    def attached(self) -> Iterator[Deltas]:
        """The hooks are on inside a ``with`` block and off after it, whatever happens."""
        try:
            for key, linear in self._linears.items():
                self._hooks.append(linear.register_forward_hook(self._hook(key)))
            yield self
        finally:
            while self._hooks:
                self._hooks.pop().remove()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model for the length of a ``with`` block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def _hook(self, key: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        parts = self._parts[key]

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.enabled:
                return None
            x = args[0].to(parts[0].dtype)
            for part in reversed(parts):
                x = F.linear(x, part)
            return output + x.to(output.dtype)

        return hook

    def parameters(self) -> list[nn.Parameter]:
        return [part for parts in self._parts.values() for part in parts]

    def factors(self, max_rank: int | None = None) -> dict[str, LowRank]:
        """The deltas as they are now, on the CPU, as factors: a LoRA's own, a dense delta's exact ones (of full rank).

        With ``max_rank`` those above it are cut to the nearest change of that rank.
        """
        found = {}
        for key, parts in self._parts.items():
            tensors = [part.detach().float().cpu() for part in parts]
            factor = LowRank(tensors[0].clone(), tensors[1].clone()) if len(tensors) == 2 else _exact(tensors[0])
            found[key] = factor if max_rank is None or factor.rank <= max_rank else factor.truncated(max_rank)
        return found


def _exact(delta: Tensor) -> LowRank:
    """A dense change times the identity on its shorter side.

    An optimiser that treats each weight alike leaves full rank, so that an SVD would take minutes on a real model to
    find no shorter form. Evenly scaled, for half precision's sake.
    """
    root = float(delta.abs().max()) ** 0.5 or 1.0
    d_out, d_in = delta.shape
    if d_out < d_in:
        return LowRank(torch.eye(d_out) * root, delta / root)
    return LowRank(delta / root, torch.eye(d_in) * root)


@dataclass(frozen=True)
class TrainingSettings:
    """What the loop itself needs: ``steps``, AdamW's ``lr`` and ``weight_decay``, a bound of the gradient's norm.

    Weight decay acts on the deltas, so it pulls back to the base model, not to zero weights.
    """

    steps: int
    lr: float
    weight_decay: float = 0.0
    clip_norm: float | None = None


def train(
    model: LatentDiffusion,
    deltas: Deltas,
    terms: Callable[[int], Terms],
    settings: TrainingSettings,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
    message: str = "training",
) -> None:
    """Minimise ``Σ weight · term`` by AdamW over the deltas, in place.

    ``terms(step)`` makes the terms of a step, ``name → (weight, scalar)``, with the deltas attached and the model
    borrowed. ``progress`` may raise :class:`Cancelled`, and so does the loop when ``should_stop()``. Raises
    :class:`ForgetConceptError` where the loss or a gradient is not finite: no step is made then.
    """
    optimiser = torch.optim.AdamW(deltas.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    with borrowed(model.unet), deltas.attached():
        for step in range(1, settings.steps + 1):
            if should_stop is not None and should_stop():
                raise Cancelled("The training was cancelled.")
            optimiser.zero_grad(set_to_none=True)
            parts = terms(step)
            loss = torch.stack([weight * term for weight, term in parts.values()]).sum()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise _diverged(step, "the loss", settings.lr)
            if not loss.requires_grad:
                raise ForgetConceptError(
                    "The loss does not depend on what is trained: choose other projections to train."
                )
            loss.backward()
            gradients = [p.grad for p in deltas.parameters() if p.grad is not None]
            norm = _norm(gradients)
            if not math.isfinite(norm):
                raise _diverged(step, "a gradient", settings.lr)
            if settings.clip_norm is not None and norm > settings.clip_norm:
                for gradient in gradients:
                    gradient.mul_(settings.clip_norm / norm)
            optimiser.step()
            told = {name: float(term.detach()) for name, (_, term) in parts.items()}
            report(progress, ProgressEvent(step, settings.steps, value, told, message))


def _norm(gradients: Sequence[Tensor]) -> float:
    # one number fetched from the device, not one a matrix
    norms = [torch.linalg.vector_norm(g) for g in gradients]
    return float(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])))


def _diverged(step: int, what: str, lr: float) -> ForgetConceptError:
    return ForgetConceptError(
        f"The training broke down at step {step}: {what} is no longer a finite number. Use a lower learning rate than "
        f"{lr:g}, or run the model in full precision."
    )
