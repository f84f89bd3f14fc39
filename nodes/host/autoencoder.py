"""Adapter from a ComfyUI VAE to the core's autoencoder."""

from __future__ import annotations

from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ...core.errors import ModelError

__all__ = ["HostAutoencoder"]


class HostAutoencoder:
    """A VAE as the core's autoencoder, with latents at the scale of the UNet's input.

    The VAE must already be loaded: its own ``encode`` and ``decode`` could unload the UNet that is in use.
    """

    def __init__(self, vae: Any, latent_format: Any) -> None:
        self._vae, self._format = vae, latent_format

    def modules(self) -> list[torch.nn.Module]:
        """The modules whose weights are used."""
        return [self._vae.first_stage_model]

    def encode(self, images: Tensor) -> Tensor:
        """Encode pictures ``(n, 3, H, W)`` in [-1, 1] to latents ``(n, c, h, w)``, the posterior's mean.

        Raises:
            ModelError: If the VAE does not encode single pictures.
        """
        found = []
        for image in images.float().split(1):
            management.throw_exception_if_processing_interrupted()
            with torch.inference_mode():
                pixels = self._vae.process_input((image + 1) / 2).to(self._vae.vae_dtype).to(self._vae.device)
                found.append(self._format.process_in(self._vae.first_stage_model.encode(pixels).float()))
            if found[-1].ndim != 4:
                raise ModelError("The VAE is not one of an image model: connect the checkpoint's own VAE.")
        return torch.cat(found).clone()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents ``(n, c, h, w)`` to pictures ``(n, 3, H, W)`` in [-1, 1]."""
        found = []
        for latent in latents.float().split(1):
            management.throw_exception_if_processing_interrupted()
            with torch.inference_mode():
                samples = self._format.process_out(latent).to(self._vae.vae_dtype).to(self._vae.device)
                found.append(self._vae.process_output(self._vae.first_stage_model.decode(samples).float()) * 2 - 1)
        return torch.cat(found).clone()
