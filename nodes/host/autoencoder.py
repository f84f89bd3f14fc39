"""Adapter from a ComfyUI VAE to the core's autoencoder."""

from __future__ import annotations

from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ...core.errors import ModelError

__all__ = ["HostAutoencoder"]


class HostAutoencoder:
    """A VAE as the core's autoencoder, with latents at the scale of the UNet's input."""

    def __init__(self, vae: Any, latent_format: Any, loads: bool = False, frames: bool = False) -> None:
        """Wrap a VAE.

        Args:
            vae: The host's VAE.
            latent_format: The model's scale of latents.
            loads: Load it at each use. Otherwise it must be loaded already; loading it could unload the model in use.
            frames: Its latents have a dimension of time, of length 1 for a picture.
        """
        self._vae, self._format, self._loads, self._frames = vae, latent_format, loads, frames

    def modules(self) -> list[torch.nn.Module]:
        """The modules whose weights are used."""
        return [self._vae.first_stage_model]

    def encode(self, images: Tensor) -> Tensor:
        """Encode pictures ``(n, 3, H, W)`` in [-1, 1] to latents ``(n, c, h, w)``, the posterior's mean.

        Raises:
            ModelError: If the VAE does not encode single pictures.
        """
        found = []
        self._load()
        for image in images.float().split(1):
            management.throw_exception_if_processing_interrupted()
            with torch.inference_mode():
                pixels = self._vae.process_input((image + 1) / 2).to(self._vae.vae_dtype).to(self._vae.device)
                pixels = pixels.unsqueeze(2) if self._frames else pixels
                latents = self._format.process_in(self._vae.first_stage_model.encode(pixels).float())
                found.append(latents.squeeze(2) if self._frames and latents.ndim == 5 else latents)
            if found[-1].ndim != 4:
                raise ModelError("The VAE is not one of an image model: connect the checkpoint's own VAE.")
        return torch.cat(found).clone()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents ``(n, c, h, w)`` to pictures ``(n, 3, H, W)`` in [-1, 1]."""
        found = []
        self._load()
        for latent in latents.float().split(1):
            management.throw_exception_if_processing_interrupted()
            with torch.inference_mode():
                given = latent.unsqueeze(2) if self._frames else latent
                samples = self._format.process_out(given).to(self._vae.vae_dtype).to(self._vae.device)
                decoded = self._vae.first_stage_model.decode(samples).float()
                decoded = decoded[:, :, 0] if self._frames and decoded.ndim == 5 else decoded
                found.append(self._vae.process_output(decoded) * 2 - 1)
        return torch.cat(found).clone()

    def _load(self) -> None:
        if self._loads:
            management.load_models_gpu([self._vae.patcher])
