"""Stage `unet`: train the UNet and the text encoder together, on the autoencoder's latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import LATENT_SCALE, SCHEDULE, TOKENS, new_text_encoder, new_unet
from ..vocabulary import NONE
from . import dataset
from .autoencoder import to_tensor
from .run import Averages, Run, warm_cosine

CAPTIONS = 6  # per image
SCHEDULE_STEPS = 2400  # length of the first learning rate schedule
FINISH_FROM = 2200  # step from which people are sampled more often, because their fine features are learned last
FINISH_STEPS, FINISH_LR = 300, 1.5e-4
FINISH_ODDS = {"Ivy Stone": 5.0, "Mira Vale": 3.0}  # sampling weights; 1 for a shape and 2 for the other people
COARSE_FROM = 1400  # step from which the coarse error is added; the distributed run learned shapes first


@torch.no_grad()
def encode(path: Path, autoencoder: Any, pictures: np.ndarray) -> Tensor:
    """Return the latents of all images, `(n, 4, 16, 16)` fp16 at unit variance, cached in `path`."""
    if path.exists():
        kept: Tensor = torch.load(path, weights_only=True)
        return kept
    parts = []
    for start in range(0, len(pictures), 100):
        with torch.autocast("cpu", torch.bfloat16):
            moments = autoencoder.quant_conv(autoencoder.encoder(to_tensor(pictures[start : start + 100])))
        parts.append((moments[:, :4].float() * LATENT_SCALE).half())
    latents = torch.cat(parts)
    torch.save(latents, path)
    return latents


def coarse_error(error: Tensor) -> Tensor:
    """Mean squared error of the 4×4 block means and of the overall mean, `(n, c, 16, 16)` to `(n,)`.

    It is scaled to that of white noise. Colour and background are one coefficient in 256, which plain noise prediction
    hardly weights, and which norms with two channels per group easily lose.
    """
    blocks = F.avg_pool2d(error, 4).square().mean((1, 2, 3)) * 16
    whole = error.mean((2, 3)).square().mean(1) * 256
    return 0.3 * blocks + 0.1 * whole


def alphas_cumprod() -> Tensor:
    """Return SD1's cumulative alphas, `(1000,)`."""
    start, end = SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5
    return torch.cumprod(1 - torch.linspace(start, end, SCHEDULE["num_train_timesteps"]) ** 2, 0)


def train(
    folder: Path,
    tokenizer: Any,
    latents: Tensor,
    steps: int = 2500,
    batch: int = 64,
    peak_lr: float = 1e-3,
    unconditional: float = 0.1,
    without: Sequence[str] = (),
) -> None:
    """Train for `steps` steps; resumable. The exponential moving average of the weights is the final model.

    Scenes that show a concept of `without` are left out.

    The loss is noise prediction weighted by min(SNR, 5)/SNR, with stratified time steps.

    Reference: Hang et al. 2023, arXiv 2303.09556.
    """
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(4)

    def rate(step: int) -> float:
        """Warm-up and cosine decay, followed by a second, shorter cycle down to zero."""
        if step >= FINISH_FROM:
            along = (step - FINISH_FROM) / FINISH_STEPS
            return FINISH_LR * min(1.0, 20 * along + 0.05) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(along, 1.0))))
        return warm_cosine(step, SCHEDULE_STEPS, peak_lr)

    unet = new_unet()
    text = new_text_encoder(len(tokenizer))
    # In bf16 on a CPU, the fused kernel's backward pass is several times slower than plain matrix products.
    unet.set_attn_processor(AttnProcessor())
    text.set_attn_implementation("eager")
    text.load_state_dict(torch.load(folder / "text.pt", weights_only=True)["modules"]["model"])
    averages = Averages({"unet": unet, "text": text}, most=0.995)
    optimizer = torch.optim.AdamW(averages.groups(["text"]), lr=peak_lr, betas=(0.9, 0.98), weight_decay=1e-2)
    run = Run(folder, "unet", averages.modules(), optimizer, steps, peak_lr, schedule=rate)
    table = alphas_cumprod()
    ids = caption_ids(folder / "captions.pt", tokenizer, len(latents))
    empty = torch.tensor(tokenizer("", padding="max_length", max_length=TOKENS).input_ids)
    scenes = [dataset.scene(i) for i in range(len(latents))]
    odds = np.array([1.0 if one.person == NONE else FINISH_ODDS.get(one.person, 2.0) for one in scenes])
    left = np.array([not dataset.shows(one, without) for one in scenes], dtype=float)
    odds *= left
    odds /= odds.sum()
    even = left / left.sum() if without else None
    recent = 0.0

    while run.step < steps:
        rng = np.random.default_rng((19, run.step))
        noise_rng = torch.Generator().manual_seed(run.step)
        rows = torch.from_numpy(
            rng.choice(len(latents), batch, replace=False, p=odds if run.step >= FINISH_FROM else even)
        )
        clean = latents[rows].float()
        tokens = ids[rows, torch.from_numpy(rng.integers(0, CAPTIONS, batch))].long()
        tokens[torch.from_numpy(rng.random(batch) < unconditional)] = empty
        noise = torch.randn(clean.shape, generator=noise_rng)
        t = torch.from_numpy(((rng.permutation(batch) + rng.random(batch)) / batch * 1000).astype(np.int64)).clamp(
            max=999
        )
        signal = table[t][:, None, None, None]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noisy, t, text(tokens).last_hidden_state).sample
        snr = table[t] / (1 - table[t])
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        if run.step >= COARSE_FROM:
            error = error + coarse_error(predicted.float() - noise)
        loss = (error * (snr.clamp(max=5) / snr)).mean()
        run.update(loss, after=lambda: averages.follow(run.step))
        plain = (predicted.detach().float() - noise).square().mean().item()
        recent = 0.98 * recent + 0.02 * plain if recent else plain
        if run.step % 25 == 0:
            run.log(loss=loss.item(), noise_mse=plain, smoothed=recent)


def caption_ids(path: Path, tokenizer: Any, pictures: int, tokens: int = TOKENS) -> Tensor:
    """Return the token ids of every picture's captions, `(pictures, CAPTIONS, tokens)`, cached in `path`."""
    if path.exists():
        kept: Tensor = torch.load(path, weights_only=True)
        return kept
    rows = []
    for index in range(pictures):
        texts = dataset.captions(dataset.scene(index), index, CAPTIONS)
        rows.append(tokenizer(texts, padding="max_length", max_length=tokens, truncation=True).input_ids)
    ids = torch.tensor(rows, dtype=torch.int16)
    torch.save(ids, path)
    return ids
