"""Noise schedules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["flow_sigmas", "sd_alphas_cumprod", "shifted"]


def sd_alphas_cumprod(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Return ``α̅_t`` of Stable Diffusion 1, 2 and XL (the "scaled linear" schedule), fp32, ``(steps,)``."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def flow_sigmas(steps: int = 1000) -> Tensor:
    """Return ``σ_t`` of flow matching, ``x_t = (1-σ_t) x_0 + σ_t ε``: from ``1/T`` to 1, fp32, ``(steps,)``."""
    return (torch.arange(1, steps + 1, dtype=torch.float64) / steps).float()


def shifted(sigma: float, shift: float) -> float:
    """``σ`` under a resolution's shift, which spends more steps on noisy pictures (arXiv 2403.03206, 5.3.2)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _log_snr(signal: float, noise: float) -> float:
    """``λ = log(signal / noise)``: half the log of the signal-to-noise ratio."""
    return math.log(signal / noise)
