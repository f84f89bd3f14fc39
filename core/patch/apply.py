"""Applying a patch by forward hooks, which leave the weights unchanged."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .low_rank import LowRank

__all__ = ["PatchHandle", "Removable"]


class Removable(Protocol):
    """What a handle takes off: torch's ``RemovableHandle``, or an adapter."""

    def remove(self) -> None: ...


class PatchHandle:
    """An applied patch; :meth:`remove` or leaving a ``with`` block removes it."""

    def __init__(self) -> None:
        self._hooks: list[Removable] = []

    def add(self, hook: Removable) -> None:
        """Register one more hook to remove."""
        self._hooks.append(hook)

    def remove(self) -> None:
        """Remove the patch from the model; further calls do nothing."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class _Delta:
    """Forward hook that adds ``strength · up(down(x))`` to the output of a linear layer."""

    def __init__(self, factor: LowRank, strength: float, device: torch.device) -> None:
        # fp32 for any dtype of the layer: the change is small compared to the output, and low rank makes it cheap
        up, down = factor.up.to(device), factor.down.to(device)
        wide = torch.float64 if up.dtype == torch.float64 else torch.float32
        self.up, self.down = up.to(wide) * strength, down.to(wide)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        if self.up.device != x.device:  # the host has moved the model
            self.up, self.down = self.up.to(x.device), self.down.to(x.device)
        change = F.linear(F.linear(x.to(self.up.dtype), self.down), self.up)
        return output + change.to(output.dtype)
