"""Damaged weights: a checkpoint with NaN or infinite values is named as the cause before anything is fitted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ModelError, listed

__all__ = ["check_weights", "not_finite"]


# Where a checkpoint's CLIP has none of these, a host makes them in memory that it leaves as it finds it, and reads no
# result of them. Where one is read, the pooled vectors are looked at as they are encoded.
_UNREAD = re.compile(r"(?:^|\.)(?:text_projection|logit_scale)(?:\.|$)")


class Parts(Protocol):
    """The parts of a :class:`LatentDiffusion` that hold weights."""

    name: str
    unet: nn.Module
    text: Any
    vae: Any


def check_weights(model: Parts) -> None:
    """Check every weight of the UNet, the text encoder and the autoencoder, as far as they are plain tensors.

    Costs one pass over the weights and no copy of them.

    Raises:
        ModelError: A weight is NaN or infinite; names the tensors.
    """
    for part, module in _modules(model):
        tensors = [*module.named_parameters(), *_stored_buffers(module)]
        if bad := not_finite((name, tensor) for name, tensor in tensors if not _UNREAD.search(name)):
            raise ModelError(
                f"The checkpoint '{model.name}' is damaged: {part} has NaN or infinite values in {listed(bad, 3)}. Get "
                "the checkpoint again, or take off what was merged into it."
            )


def _stored_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a checkpoint holds; others, such as the attention mask of open_clip, may well be infinite."""
    for path, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _modules(model: Parts) -> Iterator[tuple[str, nn.Module]]:
    yield "its UNet", model.unet
    for what, part in (("its text encoder", model.text), ("its autoencoder", model.vae)):
        modules = getattr(part, "modules", None)  # where it names them
        for module in () if modules is None else modules():
            yield what, module


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors with NaN or infinite values; tensors that are not plain floats are left out.

    Args:
        tensors: Names and tensors, of any dtype and on any devices.
    """
    sums: dict[torch.device, list[tuple[str, Tensor, Tensor]]] = {}
    with torch.no_grad():
        for name, tensor in tensors:
            # quantised, lazily loaded and meta tensors have no values to read
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.is_floating_point():
                continue
            plain = tensor.detach()
            if plain.element_size() == 1:  # torch adds no float8
                plain = plain.half()
            sums.setdefault(plain.device, []).append((name, plain, _sum(plain)))
        suspect = [
            (name, tensor)
            for several in sums.values()  # one synchronization per device
            for (name, tensor, _), total in zip(
                several, torch.stack([total for *_, total in several]).tolist(), strict=True
            )
            if total - total != 0  # NaN or infinite
        ]
        # large finite values may overflow a sum: only the values themselves tell
        return [name for name, tensor in suspect if not bool(torch.isfinite(tensor).all())]


def _sum(tensor: Tensor) -> Tensor:
    return tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).float()
