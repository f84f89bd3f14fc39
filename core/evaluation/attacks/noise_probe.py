"""Attack with another sampler: noise is added after every step, more than the sampler compensates.

A sampler without noise may never visit the images that show the concept. Every image is drawn with several amounts of
noise, and shows the concept if one of them does.

Reference: Lu et al. 2025, "When Are Concepts Erased From Diffusion Models?", arXiv 2505.17013.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...models.sampling_start import ExtraNoise
from ...progress import Progress
from .context import AttackContext, SearchResult
from .latent_inversion import STEPS_FACTOR

__all__ = ["noise_probe"]

# the published ranges
_ETA, _VARIANCE = (1.0, 1.85), (1.0, 1.04)


def noise_probe(context: AttackContext, progress: Progress | None = None) -> SearchResult:
    """Sample the target's prompts with every amount of noise."""
    count = context.budget.noises
    etas = torch.linspace(*_ETA, count).tolist()
    # the variances in another order, so that few amounts cover both ranges
    variances = torch.linspace(*_VARIANCE, count).roll(count // 2).tolist()
    noises = tuple(ExtraNoise(*pair) for pair in zip(etas, variances, strict=True))
    sampling = replace(context.sampling, sampler="ddim", steps=STEPS_FACTOR * context.sampling.steps)
    return SearchResult(context.target.prompts, context.model, noises=noises, sampling=sampling)
