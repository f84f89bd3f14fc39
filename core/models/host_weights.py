"""Working on a host's loaded weights without a copy: a detached view that gradients flow through, undone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .autoencoders import Autoencoder
from .latent_diffusion import LatentDiffusion
from .model_survey import ModelSurvey
from .text_encoders import TextEncoder
from .text_states import TextStates

__all__ = [
    "PLAIN_DTYPES",
    "HostLatentDiffusion",
    "check_channels",
    "coarse_dtype",
    "detached_view",
    "usual_latent_side",
    "without_checkpointing",
]

# weights in any other dtype (fp8, quantised) are too coarse to read or to write an edit into
PLAIN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def coarse_dtype(found: ModelSurvey) -> str | None:
    """The dtype outside :data:`PLAIN_DTYPES` that a surveyed layer is stored in; ``None`` where there is none."""
    dtypes = (layer.module.weight.dtype for layer in found.layers.values())
    odd = next((dtype for dtype in dtypes if dtype not in PLAIN_DTYPES), None)
    return None if odd is None else str(odd).removeprefix("torch.")


def usual_latent_side(family: str, prediction_type: str) -> int:
    """The side of the latents that models of a family were trained at; hosts do not record it."""
    return {"sdxl": 128, "sd2": 96 if prediction_type == "v_prediction" else 64}.get(family, 64)


class HostLatentDiffusion(LatentDiffusion):
    """A host's loaded model, on the device and in the dtype that the host computes with.

    The weights themselves may lie elsewhere or be stored in another dtype. Complete once constructed: an adapter sets
    nothing afterwards.
    """

    def __init__(
        self,
        unet: nn.Module,
        text: TextEncoder,
        alphas_cumprod: Tensor | None,
        prediction_type: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        vae: Autoencoder | None,
        latent_shape: tuple[int, int, int],
        guidance: float,
        name: str,
        eps_model: Callable[[Tensor, Tensor, TextStates], Tensor],
        model_hash: str | None = None,
        shift: float = 1.0,
    ) -> None:
        """See :class:`LatentDiffusion` for what is not listed here.

        Args:
            device: Where the host computes; inputs of ``eps_model`` are moved there.
            dtype: What the host computes in; inputs of ``eps_model`` are converted to it.
            eps_model: The host's own way to call the UNet.
        """
        super().__init__(
            unet,
            text,
            alphas_cumprod,
            prediction_type,
            vae=vae,
            latent_shape=latent_shape,
            name=name,
            model_hash=model_hash,
            eps_model=eps_model,
            guidance=guidance,
            shift=shift,
        )
        self._device, self._dtype = device, dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype


@contextmanager
def detached_view(module: nn.Module) -> Iterator[None]:
    """Inside a ``with`` block, every parameter and buffer is an ordinary frozen tensor on the same memory.

    A host's weights may be inference tensors, which autograd refuses, or have ``requires_grad`` set. The host's own
    tensors and the modules' training flags are restored when the block ends, however it ends.
    """
    originals: list[tuple[dict[str, Any], str, Tensor]] = []
    views: dict[int, Tensor] = {}
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            stores: tuple[Any, Any] = (part._parameters, part._buffers)
            for store in stores:
                for name, tensor in store.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in views:
                        views[id(tensor)] = _view(tensor)
                    originals.append((store, name, tensor))
                    store[name] = views[id(tensor)]
        yield
    finally:
        for store, name, tensor in originals:
            store[name] = tensor
        for part, mode in modes:
            part.training = mode


@contextmanager
def without_checkpointing(unet: nn.Module) -> Iterator[None]:
    """Inside a ``with`` block, activation checkpointing of the original code is off.

    It recomputes activations in a way that loses the gradients of what forward hooks add.
    """
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
    """Raise :class:`ModelError` unless a host's UNet takes latents ``(n, c, h, w)`` and no further channels."""
    if latents.shape[1] != unet.in_channels:
        raise ModelError(
            f"This UNet takes {unet.in_channels} channels (an inpainting or edit model): only a closed form (uce) can "
            "make it forget."
        )


def _view(tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter):  # quantised or lazily loaded: there is no plain memory to share
        return tensor
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return nn.Parameter(plain, requires_grad=False) if isinstance(tensor, nn.Parameter) else plain
