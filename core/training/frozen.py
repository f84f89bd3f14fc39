"""A context manager that freezes modules and restores their flags."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["frozen"]


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
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
