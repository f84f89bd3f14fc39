"""What linear layers read and give in one pass, for gradients of their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ModelError

__all__ = ["LinearCapture"]


class LinearCapture:
    """Captures inputs and outputs of projections; the outputs are differentiable although every weight is frozen."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self._linears = linears
        self._calls: dict[str, list[tuple[Tensor, Tensor]]] = {key: [] for key in linears}

    @contextmanager
    def attached(self) -> Iterator[LinearCapture]:
        hooks: list[RemovableHandle] = []
        try:
            for key, linear in self._linears.items():
                hooks.append(linear.register_forward_hook(self._hook(key)))
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, key: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            self._calls[key].append((args[0].detach(), output))
            return output

        return hook

    def inputs(self, rows: int) -> list[Tensor]:
        for key, calls in self._calls.items():
            if len(calls) != 1 or calls[0][0].ndim not in (2, 3) or len(calls[0][0]) != rows:
                raise ModelError(
                    f"The Fisher information of '{key}' cannot be measured: this model does not use the projection "
                    "exactly once per pass, on the whole batch. Leave it out."
                )
        return [calls[0][0] for calls in self._calls.values()]

    def outputs(self) -> list[Tensor]:
        return [calls[0][1] for calls in self._calls.values()]
