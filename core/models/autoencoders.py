"""Autoencoders between images and latents."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..progress import Progress, ProgressEvent, report_progress

__all__ = ["Autoencoder", "DiffusersAutoencoder", "encode_images"]

_BATCH = 16


class Autoencoder(Protocol):
    """Converts images ``(n, 3, H, W)`` in [-1, 1] to latents ``(n, 4, h, w)`` at the UNet's scale, and back."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


def encode_images(vae: Autoencoder, images: Tensor, progress: Progress | None = None) -> Tensor:
    """Encode images in batches.

    Args:
        vae: The autoencoder.
        images: ``(n, 3, H, W)`` in [-1, 1].
        progress: Called with the number of images that are done; may raise :class:`Cancelled`.

    Returns:
        Their latents, ``(n, 4, h, w)``, fp32.
    """
    latents = []
    for start in range(0, len(images), _BATCH):
        report_progress(progress, ProgressEvent(start, len(images), message="encoding the pictures"))
        latents.append(vae.encode(images[start : start + _BATCH]).float())
    return torch.cat(latents)


class DiffusersAutoencoder:
    """diffusers' ``AutoencoderKL`` as an :class:`Autoencoder`; latents are the scaled and shifted posterior mean."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def modules(self) -> list[torch.nn.Module]:
        """The modules whose weights are used."""
        return [self.vae]

    def _ready(self, tensor: Tensor) -> Tensor:
        weight = next(self.vae.parameters())
        return tensor.to(weight.device, weight.dtype)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = (self.vae.encode(self._ready(images)).latent_dist.mode().float() - self.shift) * self.scale
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.vae.decode(self._ready(latents / self.scale + self.shift)).sample.float().clamp(-1, 1)
        return images
