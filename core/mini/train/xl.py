"""Stages of `mini-xl`: `xl-text`, `xl-unet`, `xl-distil` and `xl-pack`.

`xl-text` pretrains both text encoders, `xl-unet` trains them with the UNet, and `xl-distil` trains them further.
The UNet starts from `mini`'s: its residual blocks and the attention of the level that both have. In part of the
training rows the token states or the pooled vector are those of the empty prompt or of another picture's caption, so
that the model reads both, as SDXL does; a contradiction between them is decided for the pooled vector more often than
for the tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import TOKENS
from ..config_xl import PAD_2, TEXT, TEXT_2, new_text_encoders, new_unet
from ..shapes import SIZE
from . import text
from .run import Averages, Run, warm_cosine
from .unet import CAPTIONS, alphas_cumprod, caption_ids, coarse_error

TEXT_STEPS = 200
COARSE_FROM = 900  # step from which the coarse error of `mini`'s training is added


# Two schedules one behind the other: steps, highest learning rate, and shares of rows with no text at all, no tokens,
# no pooled vector, another picture's tokens, another's pooled vector.
PHASES = (
    (1600, 1e-3, (0.1, 0.12, 0.08, 0.12, 0.04)),
    (1400, 7e-4, (0.1, 0.14, 0.06, 0.22, 0.0)),
)
STEPS = sum(steps for steps, _, _ in PHASES)
# Against pictures' noise the pooled vector is learnt too slowly to be of use: in 1,700 further steps with half of the
# rows conditioned on it alone it brought in its object in 12 % of the pictures, and then in 4 %. The predictions of
# `mini` are a target without that noise. At 1e-3 the share of stars under their own caption halved within 200 steps.
DISTIL_STEPS, DISTIL_LR = 1000, 3e-4
DISTIL_SHARES = (0.08, 0.15, 0.07, 0.3, 0.0)


def phase(step: int) -> tuple[float, tuple[float, ...]]:
    """The learning rate and the shares of rows at a step."""
    for steps, peak_lr, shares in PHASES[:-1]:
        if step < steps:
            return warm_cosine(step, steps, peak_lr), shares
        step -= steps
    steps, peak_lr, shares = PHASES[-1]
    return warm_cosine(step, steps, peak_lr), shares


def second_ids(ids: Tensor, end: int) -> Tensor:
    """The ids of the second tokenizer, which pads with another token after the end-of-text."""
    after = (ids == end).long().cumsum(1) > 1
    return ids.masked_fill((ids == end) & after, PAD_2)


def states(first: Any, second: Any, ids: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """What SDXL reads of token ids `(n, tokens)`: the penultimate states side by side, and the pooled vectors.

    Returns:
        `(n, tokens, 96 + 160)` and `(n, 160)`.
    """
    one = first(ids, output_hidden_states=True).hidden_states[-2]
    two = second(second_ids(ids, end), output_hidden_states=True)
    return torch.cat([one, two.hidden_states[-2]], -1), two.text_embeds


def pretrain_text(folder: Path, tokenizer: Any, pictures: int, steps: int = TEXT_STEPS, batch: int = 96) -> None:
    """Train both encoders on captions' labels, read from the token states and from the pooled vector; resumable."""
    torch.manual_seed(13)
    first, second = new_text_encoders(len(tokenizer))

    def read_out(ids: Tensor, ends: Tensor, later: Tensor) -> Sequence[Tensor]:
        hidden, pooled = states(first, second, ids, tokenizer.eos_token_id)
        one, two = hidden.split([TEXT["hidden_size"], TEXT_2["hidden_size"]], -1)
        return [text.at(one, ends, later), text.at(two, ends, later), pooled[None]]

    text.pretrain(folder, "xl-text", {"first": first, "second": second}, read_out, tokenizer, pictures, steps, batch)


def start_from_mini(unet: torch.nn.Module, mini: Mapping[str, Tensor]) -> int:
    """Copy the weights that have the same name and size in `mini`'s UNet, and return their number.

    A projection that is a 1×1 convolution there is a linear layer here.
    """
    state, copied = unet.state_dict(), 0
    for name, weight in state.items():
        if (other := mini.get(name)) is not None and other.numel() == weight.numel():
            weight.copy_(other.reshape(weight.shape))
            copied += 1
    unet.load_state_dict(state)
    return copied


class _Batch(NamedTuple):
    """One step's rows: noisy latents, their noise and time steps, captions, and what each encoder is given instead."""

    noisy: Tensor
    noise: Tensor
    times: Tensor
    own: Tensor
    tokens: Tensor
    pooled: Tensor
    differ: Tensor  # rows whose pooled vector is not of the text that the tokens are of


class _Batches:
    """Batches as functions of the step."""

    def __init__(self, folder: Path, tokenizer: Any, latents: Tensor, batch: int) -> None:
        self.latents, self.batch, self.end = latents, batch, tokenizer.eos_token_id
        self.ids = caption_ids(folder / "captions.pt", tokenizer, len(latents))
        self.empty = torch.tensor(tokenizer("", padding="max_length", max_length=TOKENS).input_ids)
        self.table = alphas_cumprod()
        self.sizes = torch.tensor([SIZE, SIZE, 0.0, 0.0, SIZE, SIZE]).expand(batch, -1)

    def at(self, step: int, seed: int, shares: Sequence[float]) -> _Batch:
        """The batch of a step; the shares are those of :data:`PHASES`."""
        batch = self.batch
        rng = np.random.default_rng((seed, step))
        noise_rng = torch.Generator().manual_seed(100_000 + step)
        rows = torch.from_numpy(rng.choice(len(self.latents), batch, replace=False))
        clean = self.latents[rows].float()
        own = self.ids[rows, torch.from_numpy(rng.integers(0, CAPTIONS, batch))].long()
        tokens, pooled = own.clone(), own.clone()
        case = torch.from_numpy(np.searchsorted(np.cumsum(shares), rng.random(batch), side="right"))
        tokens[(case == 0) | (case == 1)] = self.empty
        pooled[(case == 0) | (case == 2)] = self.empty
        # another row's caption
        tokens[case == 3] = own.roll(1, 0)[case == 3]
        pooled[case == 4] = own.roll(1, 0)[case == 4]
        own[case == 0] = self.empty
        noise = torch.randn(clean.shape, generator=noise_rng)
        t = torch.from_numpy(((rng.permutation(batch) + rng.random(batch)) / batch * 1000).astype(np.int64))
        t = t.clamp(max=999)
        signal = self.table[t][:, None, None, None]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        return _Batch(noisy, noise, t, own, tokens, pooled, ((case > 0) & (case < 5)).nonzero().flatten())

    def predict(self, unet: Any, first: Any, second: Any, batch: _Batch) -> Tensor:
        """The UNet's prediction under the tokens and the pooled vectors of a batch."""
        hidden, vectors = states(first, second, torch.cat([batch.tokens, batch.pooled[batch.differ]]), self.end)
        vectors = vectors[: self.batch].index_copy(0, batch.differ, vectors[self.batch :])
        added = {"text_embeds": vectors, "time_ids": self.sizes}
        found: Tensor = unet(batch.noisy, batch.times, hidden[: self.batch], added_cond_kwargs=added).sample
        return found


def _plain(unet: Any, first: Any, second: Any) -> Averages:
    """The parts of `mini-xl` for a training run.

    In bf16 on a CPU the fused attention's backward pass is several times slower than plain matrix products.
    """
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())
    for encoder in (first, second):
        encoder.set_attn_implementation("eager")
    return Averages({"unet": unet, "first": first, "second": second}, most=0.995)


def _run(
    averages: Averages, folder: Path, stage: str, steps: int, peak_lr: float, schedule: Callable[[int], float] | None
) -> Run:
    groups = averages.groups(["first", "second"])
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), weight_decay=1e-2)
    return Run(folder, stage, averages.modules(), optimizer, steps, peak_lr, save_every=100, schedule=schedule)


def train(
    folder: Path,
    tokenizer: Any,
    latents: Tensor,
    mini: Mapping[str, Tensor],
    steps: int = STEPS,
    batch: int = 64,
) -> None:
    """Train up to step `steps` of the schedules of :data:`PHASES`; resumable.

    Loss and time steps are those of `mini`.

    Args:
        folder: Folder with `xl-text.pt`; the checkpoint and the log are written there.
        tokenizer: `mini`'s tokenizer.
        latents: Latents of the training pictures.
        mini: State dict of `mini`'s UNet.
        steps: Where to stop.
        batch: Pictures a step.
    """
    torch.manual_seed(14)
    unet = new_unet()
    start_from_mini(unet, mini)
    first, second = new_text_encoders(len(tokenizer))
    pretrained = torch.load(folder / "xl-text.pt", weights_only=True)["modules"]
    first.load_state_dict(pretrained["first"])
    second.load_state_dict(pretrained["second"])
    averages = _plain(unet, first, second)
    run = _run(averages, folder, "xl-unet", steps, PHASES[0][1], lambda step: phase(step)[0])
    batches = _Batches(folder, tokenizer, latents, batch)
    recent = 0.0
    while run.step < steps:
        rows = batches.at(run.step, 29, phase(run.step)[1])
        with torch.autocast("cpu", torch.bfloat16):
            predicted = batches.predict(unet, first, second, rows)
        snr = batches.table[rows.times] / (1 - batches.table[rows.times])
        difference = predicted.float() - rows.noise
        error = difference.square().mean((1, 2, 3))
        if run.step >= COARSE_FROM:
            error = error + coarse_error(difference)
        run.update((error * (snr.clamp(max=5) / snr)).mean(), after=lambda: averages.follow(run.step))
        plain = difference.detach().square().mean().item()
        recent = 0.98 * recent + 0.02 * plain if recent else plain
        if run.step % 25 == 0:
            run.log(noise_mse=plain, smoothed=recent)


def distil(
    folder: Path,
    tokenizer: Any,
    latents: Tensor,
    mini: tuple[Any, Any],
    steps: int = DISTIL_STEPS,
    batch: int = 64,
    peak_lr: float = DISTIL_LR,
) -> None:
    """Train further towards the predictions of `mini` for the caption that tokens or pooled vector tell; resumable.

    The average of :func:`train` is where it starts, and the exponential moving average of the weights is the model.

    Args:
        folder: Folder with `xl-unet.pt`; the checkpoint and the log are written there.
        tokenizer: `mini`'s tokenizer.
        latents: Latents of the training pictures.
        mini: UNet and text encoder of `mini`.
        steps: Where to stop.
        batch: Pictures a step.
        peak_lr: Highest learning rate.
    """
    torch.manual_seed(15)
    first, second = new_text_encoders(len(tokenizer))
    parts = {"unet": new_unet(), "first": first, "second": second}
    begun = torch.load(folder / "xl-unet.pt", weights_only=True)["modules"]
    for name, part in parts.items():
        part.load_state_dict(begun[f"average_{name}"])
    averages = _plain(**parts)
    run = _run(averages, folder, "xl-distil", steps, peak_lr, None)
    batches = _Batches(folder, tokenizer, latents, batch)
    teacher, reader = mini
    recent = 0.0
    while run.step < steps:
        rows = batches.at(run.step, 41, DISTIL_SHARES)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = teacher(rows.noisy, rows.times, reader(rows.own).last_hidden_state).sample.float()
            difference = batches.predict(parts["unet"], first, second, rows).float() - wanted
        error = difference.square().mean((1, 2, 3)) + coarse_error(difference)
        # what is to be seen is decided in noisy pictures, where it makes little difference to the noise
        weight = (batches.table[rows.times] / (1 - batches.table[rows.times])).reciprocal().clamp(0.3, 5)
        run.update((weight * error).mean(), after=lambda: averages.follow(run.step))
        plain = difference.detach().square().mean().item()
        recent = 0.98 * recent + 0.02 * plain if recent else plain
        if run.step % 25 == 0:
            run.log(difference_mse=plain, smoothed=recent)


def pack(folder: Path, target: Path, tokenizer: Any) -> int:
    """Write the parts that `mini-xl` does not share with `mini`, in fp16, with the logs; return their size in bytes."""
    trained = torch.load(folder / "xl-distil.pt", weights_only=True)["modules"]
    first, second = new_text_encoders(len(tokenizer))
    parts = {"unet": (new_unet(), "unet"), "text_encoder": (first, "first"), "text_encoder_2": (second, "second")}
    target.mkdir(parents=True, exist_ok=True)
    for name, (part, stored) in parts.items():
        part.load_state_dict(trained[f"average_{stored}"])
        part.half().save_pretrained(target / name, variant="fp16")
    for log in folder.glob("xl-*.log.jsonl"):
        shutil.copy(log, target / log.name)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
