"""A fixed batch of noised pictures: how well a model denoises them under some words, always the same question.

The denoising loss of pictures of the concept is what the attacks make small: words that explain the pictures well are
words that draw them (UnlearnDiffAtk, arXiv 2310.11868: the diffusion model as its own classifier).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.latent_diffusion import LatentDiffusion
from ...models.text_encoders import TextStates

__all__ = ["NoisedRows", "denoising_losses", "noised_rows"]


@dataclass(frozen=True, eq=False)
class NoisedRows:
    """``x_t`` and ``ε``, each ``(n, 4, h, w)``, and ``t``, ``(n,)``."""

    x: Tensor
    times: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.x)


def noised_rows(model: LatentDiffusion, latents: Tensor, count: int, generator: torch.Generator) -> NoisedRows:
    """``count`` rows: the pictures in turn, each at a time of its own, spread evenly over the schedule."""
    x0 = latents[torch.arange(count) % len(latents)].to(model.device)
    # one from each of as many stretches of the schedule: losses of different times differ more than those of words
    share = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    times = (share * model.train_steps).long().clamp(max=model.train_steps - 1)
    times = times[torch.randperm(count, generator=generator)]
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    return NoisedRows(model.add_noise(x0, noise, times), times, noise)


def denoising_losses(model: LatentDiffusion, rows: NoisedRows, states: TextStates) -> Tensor:
    """Mean squared error of ``ε_θ(x_t, t, c)`` for each row, ``(n,)``; ``states`` has a row for each.

    Differentiable where gradients are on.
    """
    error = model.predict_noise(rows.x, rows.times, states) - rows.noise
    return error.square().flatten(1).mean(1)
