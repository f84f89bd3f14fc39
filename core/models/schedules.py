"""Noise schedules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["sd_alphas_cumprod"]


def sd_alphas_cumprod(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Return ``α̅_t`` of Stable Diffusion 1, 2 and XL (the "scaled linear" schedule), fp32, ``(steps,)``."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def _log_snr(alpha: float) -> float:
    """``λ = log(√α̅ / √(1-α̅))``: half the log of the signal-to-noise ratio."""
    return 0.5 * math.log(alpha / (1 - alpha))
