"""Shared by all training stages: resumable checkpoints, a JSON Lines log, and a learning rate schedule."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch


def warm_cosine(step: int, steps: int, peak: float) -> float:
    """Learning rate with linear warm-up over 3 % of the steps, then cosine decay to 2 % of the peak."""
    warm = max(1, round(0.03 * steps))
    if step < warm:
        return peak * (step + 1) / warm
    along = min(1.0, (step - warm) / max(1, steps - warm))
    return peak * (0.02 + 0.49 * (1 + math.cos(math.pi * along)))


class Optimizer(Protocol):
    """What a run needs of an optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class CombinedOptimizer:
    """Several optimizers, each of its own parameters, stepped as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(index): part.state_dict() for index, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, part in enumerate(self.parts):
            part.load_state_dict(state[str(index)])


class Averages:
    """Modules in training with the exponential moving averages of their weights, saved as `average_<name>`.

    Args:
        parts: The modules, by name; they are set to training mode.
        most: Upper bound of the decay, which grows with the steps.
    """

    def __init__(self, parts: Mapping[str, Any], most: float) -> None:
        self.parts, self.most = dict(parts), most
        self.copies = {name: copy.deepcopy(part) for name, part in self.parts.items()}
        for part in self.parts.values():
            part.train()

    def modules(self) -> dict[str, torch.nn.Module]:
        """The modules and their averages, by the names under which a checkpoint keeps them."""
        return {**self.parts, **{f"average_{name}": part for name, part in self.copies.items()}}

    def groups(self, slowly: Sequence[str], scale: float = 0.3) -> list[dict[str, Any]]:
        """The parameters for an optimizer; those of the modules in `slowly` at `scale` times the learning rate."""
        fast = [p for name, part in self.parts.items() if name not in slowly for p in part.parameters()]
        slow = [p for name in slowly for p in self.parts[name].parameters()]
        return [{"params": fast}, {"params": slow, "lr_scale": scale}]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move the averages after step `step`."""
        decay = min(self.most, (1 + step) / (20 + step))
        for name, part in self.parts.items():
            torch._foreach_lerp_(list(self.copies[name].parameters()), list(part.parameters()), 1 - decay)


class Run:
    """State of one stage: the checkpoint `<name>.pt` and the log `<name>.log.jsonl` in `folder`.

    Args:
        folder: Folder of the checkpoint and the log.
        name: Name of the stage.
        modules: Modules to save, by name.
        optimizer: Optimizer, whose state is saved too.
        steps: Length of the run; `step` counts from 0 and is restored on resume.
        peak_lr: Peak learning rate.
        save_every: Steps between checkpoints.
        schedule: Learning rate by step. Default: :func:`warm_cosine`.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        modules: dict[str, torch.nn.Module],
        optimizer: Optimizer,
        steps: int,
        peak_lr: float,
        save_every: int = 200,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        self.path, self.log_path = folder / f"{name}.pt", folder / f"{name}.log.jsonl"
        self.modules, self.optimizer, self.steps, self.peak_lr = modules, optimizer, steps, peak_lr
        self.save_every, self.step, self.seconds = save_every, 0, 0.0
        self.schedule = schedule
        self._began = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            for key, module in modules.items():
                module.load_state_dict(state["modules"][key])
            optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    def lr(self) -> float:
        """Return the learning rate of the current step."""
        return warm_cosine(self.step, self.steps, self.peak_lr) if self.schedule is None else self.schedule(self.step)

    def update(self, loss: torch.Tensor, clip: float = 1.0, after: Callable[[], None] | None = None) -> None:
        """Back-propagate, clip the gradients, step the optimizer, and save a checkpoint when due.

        ``after`` belongs to the step as well, and is called before the checkpoint: it may move averages of the weights.
        """
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"step {self.step}: the loss is {loss.item()}; resume from {self.path} with a lower rate"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr() * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], clip)
        self.optimizer.step()
        self.step += 1
        if after is not None:
            after()
        if self.step % self.save_every == 0 or self.step == self.steps:
            self.save()

    def save(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._began
        self._began = now
        state: dict[str, Any] = {
            "modules": {key: module.state_dict() for key, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def log(self, **values: float) -> None:
        """Append one line to the log and print it."""
        seconds = self.seconds + time.perf_counter() - self._began
        line = {"step": self.step, "lr": self.lr(), "seconds": round(seconds, 1)}
        line |= {key: float(f"{value:.6g}") for key, value in values.items()}
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{self.path.stem}: {line}", flush=True)
