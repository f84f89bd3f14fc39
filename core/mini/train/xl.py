"""Stages of `mini-xl`: `xl-text` pretrains both text encoders, `xl-unet` trains them with the UNet.

The UNet starts from `mini`'s: its residual blocks and the attention of the level that both have. In part of the
training rows the token states or the pooled vector are those of the empty prompt or of another picture's caption, so
that the model reads both, as SDXL does; a contradiction between them is decided for the pooled vector more often than
for the tokens.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import TOKENS
from ..config_xl import PAD_2, TEXT, TEXT_2, new_text_encoders, new_unet
from ..shapes import SIZE
from . import text
from .run import Run, warm_cosine
from .unet import CAPTIONS, alphas_cumprod, caption_ids, coarse_error, follow

TEXT_STEPS = 200
COARSE_FROM = 900  # step from which the coarse error of `mini`'s training is added


@dataclass(frozen=True)
class Phase:
    """Some steps of the training of the UNet with its encoders.

    Attributes:
        steps: Number of steps.
        peak_lr: Highest learning rate; it falls along a cosine.
        shares: Shares of rows with no text at all, no tokens, no pooled vector, another picture's tokens, another's
            pooled vector; the rest has its own caption.
        length: Length of the cosine, if it is cut off.
        pooled_lr: Factor of the learning rate for the layers through which the pooled vector reaches the picture.
    """

    steps: int
    peak_lr: float
    shares: tuple[float, float, float, float, float]
    length: int | None = None
    pooled_lr: float = 1.0

    def lr(self, step: int) -> float:
        """The learning rate at a step of this phase."""
        return warm_cosine(step, self.length or self.steps, self.peak_lr)


# The later ones have more rows in which only the pooled vector tells what is to be seen. In pictures with another one's
# tokens it brought in its object in 1 % after the first, in 3 % after the second; after the third a linear map read the
# object off the pooled vector in 100 %, and off `add_embedding`'s output in 49 %: hence the higher rate of the last.
PHASES = (
    Phase(1600, 1e-3, (0.1, 0.12, 0.08, 0.12, 0.04)),
    Phase(1400, 7e-4, (0.1, 0.14, 0.06, 0.22, 0.0)),
    Phase(500, 8e-4, (0.07, 0.35, 0.03, 0.2, 0.0), length=1400),
    Phase(1200, 8e-4, (0.07, 0.2, 0.03, 0.25, 0.0), pooled_lr=4.0),
)
STEPS = sum(phase.steps for phase in PHASES)
POOLED_PATH = ("add_embedding.", ".time_emb_proj.")  # the layers that `Phase.pooled_lr` is for


def phase_at(step: int) -> tuple[Phase, int]:
    """The phase of a step, and the number of the step in it."""
    for phase in PHASES[:-1]:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    return PHASES[-1], step


def scheduled_lr(step: int) -> float:
    """The learning rate at a step."""
    phase, within = phase_at(step)
    return phase.lr(within)


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


def train(
    folder: Path,
    tokenizer: Any,
    latents: Tensor,
    mini: Mapping[str, Tensor],
    steps: int = STEPS,
    batch: int = 64,
) -> None:
    """Train up to step `steps` of the schedules of :data:`PHASES`; resumable.

    The exponential moving average of the weights is the final model. Loss and time steps are those of `mini`.

    Args:
        folder: Folder with `xl-text.pt`; the checkpoint and the log are written there.
        tokenizer: `mini`'s tokenizer.
        latents: Latents of the training pictures.
        mini: State dict of `mini`'s UNet.
        steps: Where to stop.
        batch: Pictures a step.
    """
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(14)
    unet = new_unet()
    start_from_mini(unet, mini)
    first, second = new_text_encoders(len(tokenizer))
    trained = torch.load(folder / "xl-text.pt", weights_only=True)["modules"]
    first.load_state_dict(trained["first"])
    second.load_state_dict(trained["second"])
    # in bf16 on a CPU the fused kernel's backward pass is several times slower than plain matrix products
    unet.set_attn_processor(AttnProcessor())
    for encoder in (first, second):
        encoder.set_attn_implementation("eager")
    parts = {"unet": unet, "first": first, "second": second}
    averages = {f"average_{name}": copy.deepcopy(part) for name, part in parts.items()}
    on_path = {name: any(part in name for part in POOLED_PATH) for name, _ in unet.named_parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [weight for name, weight in unet.named_parameters() if not on_path[name]]},
        {"params": [weight for name, weight in unet.named_parameters() if on_path[name]]},
        {"params": [*first.parameters(), *second.parameters()], "lr_scale": 0.3},
    ]
    peak_lr = PHASES[0].peak_lr
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), weight_decay=1e-2)
    run = Run(
        folder,
        "xl-unet",
        {**parts, **averages},
        optimizer,
        steps,
        peak_lr,
        save_every=100,
        schedule=scheduled_lr,
    )
    table = alphas_cumprod()
    ids = caption_ids(folder / "captions.pt", tokenizer, len(latents))
    end = tokenizer.eos_token_id
    empty = torch.tensor(tokenizer("", padding="max_length", max_length=TOKENS).input_ids)
    sizes = torch.tensor([SIZE, SIZE, 0.0, 0.0, SIZE, SIZE]).expand(batch, -1)
    for part in parts.values():
        part.train()
    recent = 0.0

    def followed() -> None:
        for name, part in parts.items():
            follow(averages[f"average_{name}"], part, min(0.995, (1 + run.step) / (20 + run.step)))

    while run.step < steps:
        rng = np.random.default_rng((29, run.step))
        noise_rng = torch.Generator().manual_seed(100_000 + run.step)
        rows = torch.from_numpy(rng.choice(len(latents), batch, replace=False))
        clean = latents[rows].float()
        own = ids[rows, torch.from_numpy(rng.integers(0, CAPTIONS, batch))].long()
        tokens, pooled = own.clone(), own.clone()
        phase, _ = phase_at(run.step)
        optimizer.param_groups[1]["lr_scale"] = phase.pooled_lr
        edges = np.cumsum(phase.shares)
        case = torch.from_numpy(np.searchsorted(edges, rng.random(batch), side="right"))
        tokens[(case == 0) | (case == 1)] = empty
        pooled[(case == 0) | (case == 2)] = empty
        # another row's caption
        tokens[case == 3] = own.roll(1, 0)[case == 3]
        pooled[case == 4] = own.roll(1, 0)[case == 4]
        noise = torch.randn(clean.shape, generator=noise_rng)
        t = torch.from_numpy(((rng.permutation(batch) + rng.random(batch)) / batch * 1000).astype(np.int64))
        t = t.clamp(max=999)
        signal = table[t][:, None, None, None]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            differ = ((case > 0) & (case < 5)).nonzero().flatten()
            hidden, vectors = states(first, second, torch.cat([tokens, pooled[differ]]), end)
            vectors = vectors[:batch].index_copy(0, differ, vectors[batch:])
            added = {"text_embeds": vectors, "time_ids": sizes}
            predicted = unet(noisy, t, hidden[:batch], added_cond_kwargs=added).sample
        snr = table[t] / (1 - table[t])
        difference = predicted.float() - noise
        error = difference.square().mean((1, 2, 3))
        if run.step >= COARSE_FROM:
            error = error + coarse_error(difference)
        run.update((error * (snr.clamp(max=5) / snr)).mean(), after=followed)
        plain = difference.detach().square().mean().item()
        recent = 0.98 * recent + 0.02 * plain if recent else plain
        if run.step % 25 == 0:
            run.log(noise_mse=plain, smoothed=recent)


def pack(folder: Path, target: Path, tokenizer: Any) -> int:
    """Write the parts that `mini-xl` does not share with `mini`, in fp16, with the logs; return their size in bytes."""
    trained = torch.load(folder / "xl-unet.pt", weights_only=True)["modules"]
    first, second = new_text_encoders(len(tokenizer))
    parts = {"unet": (new_unet(), "unet"), "text_encoder": (first, "first"), "text_encoder_2": (second, "second")}
    target.mkdir(parents=True, exist_ok=True)
    for name, (part, stored) in parts.items():
        part.load_state_dict(trained[f"average_{stored}"])
        part.half().save_pretrained(target / name, variant="fp16")
    for log in folder.glob("xl-*.log.jsonl"):
        shutil.copy(log, target / log.name)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
