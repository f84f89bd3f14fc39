"""Freezing modules for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["frozen"]


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Freeze modules and put them in evaluation mode inside a ``with`` block; every flag is restored.

    Gradients are enabled inside, even in a host that runs in inference mode, as ComfyUI does.
    """
    parameters = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for parameter, trainable in parameters:
                if trainable:  # an inference tensor does not accept the flag, and is never trainable
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
