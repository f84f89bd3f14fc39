"""Forward hooks that apply a patch to a model without changing its weights."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from .low_rank import LowRank

__all__ = ["PatchHandle"]


class PatchHandle:
    """A patch that is on; ``remove()`` takes it off (twice does no harm), and so does leaving a ``with`` block."""

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []

    def add(self, hook: RemovableHandle) -> None:
        self._hooks.append(hook)

    def remove(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class _Delta:
    """Forward hook: adds ``strength · up(down(x))`` to a linear layer's output."""

    def __init__(self, factor: LowRank, strength: float, device: torch.device) -> None:
        # fp32 whatever the layer's own dtype: the edit is small beside the output, and of low rank, so it costs little
        up, down = factor.up.to(device), factor.down.to(device)
        wide = torch.float64 if up.dtype == torch.float64 else torch.float32
        self.up, self.down = up.to(wide) * strength, down.to(wide)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        if self.up.device != x.device:  # a host has moved the model since
            self.up, self.down = self.up.to(x.device), self.down.to(x.device)
        change = F.linear(F.linear(x.to(self.up.dtype), self.down), self.up)
        return output + change.to(output.dtype)
