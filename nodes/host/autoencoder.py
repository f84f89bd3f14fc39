"""VAE as the core's autoencoder."""

from __future__ import annotations

from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ...core.errors import ModelError

__all__ = ["HostAutoencoder"]


class HostAutoencoder:
    """A VAE as the core's autoencoder, at the scale of the latents that the UNet works with.

    The VAE must have been loaded already: its own calls could push out the UNet that is being worked on.
    """

    def __init__(self, vae: Any, latent_format: Any) -> None:
        self._vae, self._format = vae, latent_format

    def encode(self, images: Tensor) -> Tensor:
        """Latents ``(n, c, h, w)`` of pictures ``(n, 3, H, W)`` in [-1, 1]; the posterior's mean."""
        found = []
        for image in images.float().split(1):
            management.throw_exception_if_processing_interrupted()
            with torch.inference_mode():
                pixels = self._vae.process_input((image + 1) / 2).to(self._vae.vae_dtype).to(self._vae.device)
                found.append(self._format.process_in(self._vae.first_stage_model.encode(pixels).float()))
            if found[-1].ndim != 4:
                raise ModelError("The VAE that came in is none of a picture model: connect the checkpoint's own.")
        return torch.cat(found).clone()

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures ``(n, 3, H, W)`` in [-1, 1] of latents ``(n, c, h, w)``."""
        found = []
        for latent in latents.float().split(1):
            management.throw_exception_if_processing_interrupted()
            with torch.inference_mode():
                samples = self._format.process_out(latent).to(self._vae.vae_dtype).to(self._vae.device)
                found.append(self._vae.process_output(self._vae.first_stage_model.decode(samples).float()) * 2 - 1)
        return torch.cat(found).clone()
