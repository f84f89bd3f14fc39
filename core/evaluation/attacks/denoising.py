"""Denoising loss on a fixed batch of noised images, the objective of the attacks.

The attacks minimize the denoising loss of images of the concept: a prompt that explains the images well also generates
them (UnlearnDiffAtk, arXiv 2310.11868, uses the diffusion model as its own classifier).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.latent_diffusion import LatentDiffusion
from ...models.text_states import TextStates

__all__ = ["NoisedRows", "denoising_losses", "noised_rows"]


@dataclass(frozen=True, eq=False)
class NoisedRows:
    """Noised latents ``x`` and their ``noise``, each ``(n, 4, h, w)``, at the time steps ``times`` ``(n,)``."""

    x: Tensor
    times: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.x)


def noised_rows(model: LatentDiffusion, latents: Tensor, count: int, generator: torch.Generator) -> NoisedRows:
    """Add noise to ``count`` latents, cycling through ``latents``, at stratified time steps.

    Args:
        model: Provides the noise schedule.
        latents: Latents ``(m, 4, h, w)``.
        count: Number of rows.
        generator: CPU generator of noise and time steps.
    """
    x0 = latents[torch.arange(count) % len(latents)].to(model.device)
    # stratified, because the loss varies more between time steps than between prompts
    share = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    times = (share * model.train_steps).long().clamp(max=model.train_steps - 1)
    times = times[torch.randperm(count, generator=generator)]
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    return NoisedRows(model.add_noise(x0, noise, times), times, noise)


def denoising_losses(model: LatentDiffusion, rows: NoisedRows, states: TextStates) -> Tensor:
    """Return the mean squared error of ``ε_θ(x_t, t, c)`` per row, ``(n,)``; differentiable.

    Args:
        model: The model.
        rows: Noised latents.
        states: Text states, one row each.
    """
    error = model.predict_noise(rows.x, rows.times, states) - rows.noise
    return error.square().flatten(1).mean(1)
