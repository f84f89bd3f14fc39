"""Attack with noise that the edited model itself finds for an image of the concept: DDIM inversion.

DDIM is reversible: run backwards from an image, under the empty prompt, it ends in noise from which the sampler, run
forwards, draws the image again. The attack runs it forwards with the prompts that name the concept.

Reference: Song et al. 2021, arXiv 2010.02502, section 4.3; used against concept erasure by Rusanovsky et al.,
arXiv 2412.00782.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...models.latent_diffusion import LatentDiffusion
from ...models.sampling_start import Start
from ...models.text_encoders import EncodedPrompts
from ...progress import Progress, ProgressEvent, report_progress
from .context import AttackContext, SearchResult

__all__ = ["STEPS_FACTOR", "invert_latents", "latent_inversion"]

# the sampler needs about twice as many steps as the default one
STEPS_FACTOR = 2


def latent_inversion(context: AttackContext, progress: Progress | None = None) -> SearchResult:
    """Find the noise of every image of the concept on the edited model."""
    sampling = replace(context.sampling, sampler="ddim", steps=STEPS_FACTOR * context.sampling.steps)
    with context.edited():
        noise = invert_latents(context.model, context.latents, sampling.steps, progress=progress)
    passes = sampling.steps * len(noise)
    start = Start(noise, noised=False)
    return SearchResult(context.target.prompts, context.model, unet_passes=passes, start=start, sampling=sampling)


@torch.no_grad()
def invert_latents(
    model: LatentDiffusion, latents: Tensor, steps: int, prompt: str = "", progress: Progress | None = None
) -> Tensor:
    """Return the noise ``(n, 4, h, w)`` from which DDIM without guidance draws these latents.

    The prediction at the end of a step stands for the one at its start, so that the result is exact for many steps
    only.

    Args:
        model: The model.
        latents: Latents of images, ``(n, 4, h, w)``.
        steps: Sampling steps.
        prompt: The prompt of all images.
        progress: Receives progress.
    """
    times = model.timesteps(steps, model.spacing)
    levels = model.noise_levels(times, steps, model.spacing, 0.0)
    states = EncodedPrompts(model.text, [prompt]).states([prompt] * len(latents))
    x = latents.to(model.device).float()
    signal, noise = levels[-1]
    for done, (time, level) in enumerate(zip(reversed(times), reversed(levels[:-1]), strict=True), 1):
        eps = model.predict_noise(x, torch.full((len(x),), time), states)
        x0 = (x - noise * eps) / signal
        signal, noise = level
        x = signal * x0 + noise * eps
        report_progress(progress, ProgressEvent(done, steps))
    return x.cpu()
