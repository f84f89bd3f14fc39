"""Stage `autoencoder`: 8× downsampling, 4 channels, latents at Stable Diffusion's scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..config import LATENT_SCALE, new_autoencoder
from .run import Run

CROP = 64  # crops of a quarter of the image are enough for convolutions; the last part of the run uses whole images


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """`(n, h, w, 3)` uint8 to `(n, 3, h, w)` float in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _batch(pictures: np.ndarray, step: int, whole: bool, size: int) -> torch.Tensor:
    rng = np.random.default_rng((11, step))
    if whole:
        return to_tensor(pictures[np.sort(rng.choice(len(pictures), size // 4, replace=False))])
    crops = np.empty((size, CROP, CROP, 3), dtype=np.uint8)
    for row, index in enumerate(rng.choice(len(pictures), size, replace=False)):
        # Offsets are aligned with the latent grid, because the decoder never sees another phase.
        y, x = 8 * rng.integers(0, 9, 2)
        crops[row] = pictures[index, y : y + CROP, x : x + CROP]
    return to_tensor(crops)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 and L2 on pixels, plus L1 on 8×8 means, which weights a small colour error over an area like a wrong edge."""
    coarse = F.l1_loss(F.avg_pool2d(output, 8), F.avg_pool2d(target, 8))
    return F.l1_loss(output, target) + coarse + F.mse_loss(output, target)


@torch.no_grad()
def start_linear(model: Any) -> None:
    """Initialize as averaging and interpolation: zero residual branches, plain resampling, almost noise-free latents.

    From the classes' own initialisation the first thousand steps went into learning to pass the mean colour through.
    """
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    tent = torch.tensor([0.25, 0.5, 0.25])
    for part in model.modules():
        if isinstance(part, ResnetBlock2D):
            torch.nn.init.zeros_(part.conv2.weight)
            torch.nn.init.zeros_(part.conv2.bias)
            if part.conv_shortcut is not None:
                torch.nn.init.orthogonal_(part.conv_shortcut.weight)
        elif isinstance(part, Attention):
            torch.nn.init.zeros_(part.to_out[0].weight)
        elif isinstance(part, Downsample2D):
            part.conv.weight.zero_()
            part.conv.weight[range(part.channels), range(part.channels), :2, :2] = 0.25
        elif isinstance(part, Upsample2D):
            part.conv.weight.zero_()
            part.conv.weight[range(part.channels), range(part.channels)] = tent[:, None] * tent
    for first in (model.encoder.conv_in, model.decoder.conv_in):
        torch.nn.init.orthogonal_(first.weight, gain=1.5)
    model.quant_conv.weight.zero_()
    model.quant_conv.weight[range(4), range(4)] = 1.0
    model.quant_conv.bias[4:] = -6.0
    torch.nn.init.dirac_(model.post_quant_conv.weight)


def train(folder: Path, pictures: np.ndarray, steps: int = 1200, batch: int = 32) -> None:
    """Train for `steps` steps (32 crops or 8 whole images each); resumable."""
    torch.manual_seed(1)
    model = new_autoencoder()
    start_linear(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    run = Run(folder, "autoencoder", {"model": model}, optimizer, steps, peak_lr=2e-3)

    def forward(images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_variance = model.quant_conv(model.encoder(images)).chunk(2, dim=1)
        log_variance = log_variance.clamp(-12, 4)
        latents = mean + noise * torch.exp(0.5 * log_variance)
        return model.decoder(model.post_quant_conv(latents)), mean, log_variance

    model.train()
    while run.step < steps:
        whole = run.step >= 0.85 * steps
        images = _batch(pictures, run.step, whole, batch)
        side = images.shape[-1] // 8
        noise = torch.randn(len(images), 4, side, side, generator=torch.Generator().manual_seed(run.step))
        with torch.autocast("cpu", torch.bfloat16):
            output, mean, log_variance = forward(images, noise)
        output, mean, log_variance = output.float(), mean.float(), log_variance.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = reconstruction_loss(output, images)
        run.update(loss + 1e-5 * kl)
        if run.step % 50 == 0:
            run.log(loss=loss.item(), l1=F.l1_loss(output, images).item(), kl=kl.item(), std=mean.std().item())


@torch.no_grad()
def rescale(model: Any, pictures: np.ndarray) -> None:
    """Fold an affine map into the 1×1 convolutions: every latent channel, times 0.18215, gets mean 0 and variance 1.

    Hosts multiply SD1's latents by that factor and by nothing else.
    """
    raw = torch.cat([model.quant_conv(model.encoder(to_tensor(p)))[:, :4] for p in np.array_split(pictures, 16)])
    mean, factor = raw.mean((0, 2, 3)), 1 / (LATENT_SCALE * raw.std((0, 2, 3)))
    model.post_quant_conv.bias += model.post_quant_conv.weight[:, :, 0, 0] @ mean
    model.post_quant_conv.weight /= factor[None, :, None, None]
    model.quant_conv.weight[:4] *= factor[:, None, None, None]
    model.quant_conv.bias[:4] = (model.quant_conv.bias[:4] - mean) * factor
    model.quant_conv.bias[4:] += 2 * factor.log()
