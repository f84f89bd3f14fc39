"""A host's loaded model, lent out: the same memory under gradients, and the host's own tensors come back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .latent_diffusion import LatentDiffusion

__all__ = ["HostLatentDiffusion", "check_channels", "detached_view", "without_checkpointing"]


class HostLatentDiffusion(LatentDiffusion):
    """On the device and in the dtype that a host computes with, wherever and however it keeps the weights."""

    host_device: torch.device
    host_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.host_device

    @property
    def dtype(self) -> torch.dtype:
        return self.host_dtype


@contextmanager
def detached_view(module: nn.Module) -> Iterator[None]:
    """Every parameter and buffer as an ordinary, frozen tensor on the same memory; the host's own come back.

    A host's weights may be inference tensors, which autograd refuses, or have ``requires_grad`` set.
    """
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    twins: dict[int, Tensor] = {}
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            stores: tuple[Any, Any] = (part._parameters, part._buffers)
            for store in stores:
                for name, tensor in store.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in twins:
                        twins[id(tensor)] = _twin(tensor)
                    kept.append((store, name, tensor))
                    store[name] = twins[id(tensor)]
        yield
    finally:
        for store, name, tensor in kept:
            store[name] = tensor
        for part, mode in modes:
            part.training = mode


@contextmanager
def without_checkpointing(unet: nn.Module) -> Iterator[None]:
    """The original code recomputes activations in a way that loses the gradients of what hooks add."""
    names = ("checkpoint", "use_checkpoint")
    kept = [(part, name) for part in unet.modules() for name in names if part.__dict__.get(name) is True]
    try:
        for part, name in kept:
            setattr(part, name, False)
        yield
    finally:
        for part, name in kept:
            setattr(part, name, True)


def check_channels(latents: Tensor, unet: Any) -> None:
    """Raise :class:`ModelError`, in words, unless latents ``(n, c, h, w)`` are all that a host's UNet takes."""
    if latents.shape[1] != unet.in_channels:
        raise ModelError(
            f"This UNet takes {unet.in_channels} channels (an inpainting or edit model): only a closed form (uce) can "
            "make it forget."
        )


def _twin(tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter):  # a quantised or lazily loaded weight: no plain memory to share
        return tensor
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return nn.Parameter(plain, requires_grad=False) if isinstance(tensor, nn.Parameter) else plain
