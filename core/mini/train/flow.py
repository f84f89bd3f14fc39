"""Stages of `mini-flow`: `flow-tokenizer`, `flow-text`, `flow-teacher`, those of `DISTIL_STAGES`, and `flow-pack`.

`flow-teacher` trains the transformer and both text encoders by flow matching, with prompts left out in part, so that it
can be drawn with under guidance. `flow-distil` and those behind it train it towards the velocity that `mini` predicts
under guidance.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...models.families.flux import predict
from ...models.text_states import TextStates
from ..config import GUIDANCE
from ..config import TOKENS as CLIP_TOKENS
from ..config_flow import TOKENS, new_text_encoders, new_transformer
from . import dataset, text
from .run import Averages, CombinedOptimizer, Optimizer, Run, warm_cosine
from .unet import CAPTIONS, alphas_cumprod, caption_ids, coarse_error

TEXT_STEPS = 250
TEACHER_STEPS, TEACHER_LR = 2400, 1.5e-3
# a second schedule behind the first, with more of the noisy pictures, where the object is decided: after the first,
# styles and people were found in nearly every picture, objects in four of five
FINISH_STEPS, FINISH_LR, FINISH_SHIFT = 2000, 1e-3, 0.5
DISTIL_SHIFT = 0.5


class Distillation(NamedTuple):
    """A stage of training towards `mini`'s velocity: the stage whose average it starts from, and its schedule."""

    before: str
    steps: int
    peak_lr: float
    seed: int
    muon: bool


# At the same steps from the first stage's end, Muon's error fell from 0.566 to 0.549 in 48 steps, AdamW's did not fall.
DISTIL_STAGES = {
    "flow-distil": Distillation("flow-teacher", 350, 6e-4, 37, False),
    "flow-finish": Distillation("flow-distil", 900, 1e-3, 43, True),
    "flow-polish": Distillation("flow-finish", 600, 1e-3, 47, True),
}
UNCONDITIONAL = 0.1
COARSE_FROM = 1400  # step from which the coarse error of `mini`'s training is added
_ENCODERS = ("clip", "t5")
LEAST = 4  # a word that occurs less often in the captions is spelt
# T5's mark of a word's beginning, and logarithms of the frequencies of what is no whole word
_SPACE, _OF_A_NAME, _OF_A_LETTER = "\u2581", -10.0, -14.0


def _pieces(pictures: int) -> list[tuple[str, float]]:
    """The vocabulary with logarithms of frequencies: whole words of the captions, parts of names, and characters."""
    from ..vocabulary import IDENTITIES

    names = {part for word in IDENTITIES for part in f"{word.name} {word.synonym}".lower().split()}
    counts: Counter[str] = Counter()
    for index in range(pictures):
        for caption in dataset.captions(dataset.scene(index), index, 2):
            counts.update(re.findall(r"[a-z]+", caption.lower()))
    total = sum(counts.values())
    pieces = {
        f"{_SPACE}{word}": math.log(count / total)
        for word, count in sorted(counts.items())
        if count >= LEAST and word not in names
    }
    # names consist of several tokens, as people's names do in T5
    for name in sorted(names):
        for at in range(0, len(name), 3):
            part = (_SPACE if at == 0 else "") + name[at : at + 3]
            pieces.setdefault(part, _OF_A_NAME)
    for letter in [_SPACE, *(chr(code) for code in range(33, 127) if not chr(code).isupper())]:
        pieces.setdefault(letter, _OF_A_LETTER)
    return list(pieces.items())


def build_tokenizer(folder: Path, pictures: int = 6000) -> None:
    """Write a tokenizer of T5's kind (Unigram: Kudo 2018, arXiv 1804.10959) for the world's captions into `folder`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", _OF_A_LETTER)]
    tokenizer = Tokenizer(models.Unigram([*special, *_pieces(pictures)], unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = T5TokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_ids=0,
        model_max_length=TOKENS,
    )
    fast.save_pretrained(folder)


def load_tokenizer(folder: Path) -> Any:
    """T5's tokenizer of `mini-flow`."""
    from transformers import T5TokenizerFast

    return T5TokenizerFast.from_pretrained(folder, local_files_only=True)


def pretrain_text(
    folder: Path, clip_tokenizer: Any, t5_tokenizer: Any, pictures: int, steps: int = TEXT_STEPS, batch: int = 96
) -> None:
    """Train both encoders on captions' labels: T5's states of the end and of a later token, and CLIP's pooled vector.

    Resumable.
    """
    torch.manual_seed(23)
    clip, t5 = new_text_encoders(len(clip_tokenizer), len(t5_tokenizer))

    def read_t5(ids: Tensor, ends: Tensor, later: Tensor) -> Sequence[Tensor]:
        return [text.at(t5(ids).last_hidden_state, ends, later)]

    def read_clip(ids: Tensor, ends: Tensor, later: Tensor) -> Sequence[Tensor]:
        return [clip(ids).pooler_output[None]]

    text.pretrain(folder, "flow-t5", {"t5": t5}, read_t5, t5_tokenizer, pictures, steps, batch)
    text.pretrain(folder, "flow-clip", {"clip": clip}, read_clip, clip_tokenizer, pictures, steps, batch)


def text_states(clip: Any, t5: Any, clip_ids: Tensor, t5_ids: Tensor) -> TextStates:
    """What the transformer reads of token ids, `(n, tokens)` of CLIP and of T5."""
    return TextStates(t5(t5_ids).last_hidden_state, clip(clip_ids).pooler_output)


class _Batches:
    """Latents with noise, and the token ids of their captions, as functions of the step."""

    def __init__(self, folder: Path, clip_tokenizer: Any, t5_tokenizer: Any, latents: Tensor, batch: int) -> None:
        self.latents, self.batch = latents, batch
        self.clip = caption_ids(folder / "captions.pt", clip_tokenizer, len(latents))
        self.t5 = caption_ids(folder / "flow-captions.pt", t5_tokenizer, len(latents), TOKENS)
        empty = {"padding": "max_length", "return_tensors": "pt"}
        self.empty_clip = clip_tokenizer([""], max_length=CLIP_TOKENS, **empty).input_ids
        self.empty_t5 = t5_tokenizer([""], max_length=TOKENS, **empty).input_ids

    def at(
        self, step: int, seed: int, unconditional: float, shift: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Clean latents, noise, shares of noise `(batch,)`, and ids for CLIP and for T5.

        The logits of the shares are normal around `shift`.
        """
        rng = np.random.default_rng((seed, step))
        rows = torch.from_numpy(rng.choice(len(self.latents), self.batch, replace=False))
        which = torch.from_numpy(rng.integers(0, CAPTIONS, self.batch))
        clip, t5 = self.clip[rows, which].long(), self.t5[rows, which].long()
        out = torch.from_numpy(rng.random(self.batch) < unconditional)
        clip[out], t5[out] = self.empty_clip, self.empty_t5
        clean = self.latents[rows].float()
        generator = torch.Generator().manual_seed(1000 * seed + step)
        noise = torch.randn(clean.shape, generator=generator)
        # stratified, and denser in the middle, where most is decided
        even = (torch.from_numpy(rng.permutation(self.batch)) + torch.from_numpy(rng.random(self.batch))) / self.batch
        sigma = torch.sigmoid(torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4)) + shift).float()
        return clean, noise, sigma, clip, t5


def _noisy(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    share = sigma[:, None, None, None]
    return (1 - share) * clean + share * noise


def _adamw(averages: Averages, peak_lr: float) -> Optimizer:
    return torch.optim.AdamW(averages.groups(_ENCODERS), lr=peak_lr, betas=(0.9, 0.98), weight_decay=1e-2)


def muon(averages: Averages, peak_lr: float) -> Optimizer:
    """Muon for the matrices of the transformer's blocks, AdamW for all else.

    Reference: Jordan et al. 2024, "Muon"; Liu et al. 2025, arXiv 2502.16982, for the scale that AdamW's rates fit.
    """
    named = list(averages.parts["transformer"].named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "blocks" in name]
    chosen = set(map(id, matrices))
    _, encoders = averages.groups(_ENCODERS)
    rest = {"params": [p for _, p in named if id(p) not in chosen]}
    return CombinedOptimizer(
        torch.optim.Muon(matrices, lr=peak_lr, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([rest, encoders], lr=peak_lr, betas=(0.9, 0.98), weight_decay=1e-2),
    )


def train_teacher(
    folder: Path,
    clip_tokenizer: Any,
    t5_tokenizer: Any,
    latents: Tensor,
    steps: int = TEACHER_STEPS + FINISH_STEPS,
    batch: int = 64,
    peak_lr: float = TEACHER_LR,
) -> None:
    """Train by flow matching up to step `steps` of two schedules, :data:`TEACHER_STEPS` and :data:`FINISH_STEPS`.

    Resumable. The exponential moving average of the weights is the teacher.
    """
    torch.manual_seed(24)
    clip, t5 = new_text_encoders(len(clip_tokenizer), len(t5_tokenizer))
    clip.load_state_dict(torch.load(folder / "flow-clip.pt", weights_only=True)["modules"]["clip"])
    t5.load_state_dict(torch.load(folder / "flow-t5.pt", weights_only=True)["modules"]["t5"])
    transformer = new_transformer()
    averages = Averages({"transformer": transformer, "clip": clip, "t5": t5}, most=0.995)
    run = Run(
        folder,
        "flow-teacher",
        averages.modules(),
        _adamw(averages, peak_lr),
        steps,
        peak_lr,
        save_every=100,
        schedule=lambda step: (
            warm_cosine(step, TEACHER_STEPS, peak_lr)
            if step < TEACHER_STEPS
            else warm_cosine(step - TEACHER_STEPS, FINISH_STEPS, FINISH_LR)
        ),
    )
    batches = _Batches(folder, clip_tokenizer, t5_tokenizer, latents, batch)
    while run.step < steps:
        shift = 0.0 if run.step < TEACHER_STEPS else FINISH_SHIFT
        clean, noise, sigma, clip_ids, t5_ids = batches.at(run.step, 31, UNCONDITIONAL, shift)
        with torch.autocast("cpu", torch.bfloat16):
            states = text_states(clip, t5, clip_ids, t5_ids)
            velocity = predict(transformer, _noisy(clean, noise, sigma), sigma, states)
        difference = velocity.float() - (noise - clean)
        error = difference.square().mean((1, 2, 3))
        if run.step >= COARSE_FROM:
            error = error + coarse_error(difference)
        run.update(error.mean(), after=lambda: averages.follow(run.step))
        if run.step % 25 == 0:
            run.log(velocity_mse=difference.detach().square().mean().item())


def _guided_by_mini(mini: tuple[Any, Any], x: Tensor, sigma: Tensor, ids: Tensor, empty: Tensor) -> Tensor:
    """The velocity that `mini` predicts under guidance.

    With noise ``(1-σ) x_0 + σ ε`` is, but for its scale, `mini`'s own ``√α̅ x_0 + √(1-α̅) ε`` of the same signal-to-noise
    ratio, and ``v = (ε - x) / (1-σ)``. Noise beyond its last time step is taken for that step's, as in its sampler.

    Args:
        mini: UNet and text encoder of `mini`.
        x: Noisy latents, ``(n, 4, h, w)``.
        sigma: Shares of noise, ``(n,)``.
        ids: Token ids of the captions, ``(n, tokens)``.
        empty: Those of the empty prompt, ``(1, tokens)``.
    """
    unet, reader = mini
    table = alphas_cumprod()
    signal = (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
    times = (len(table) - 1 - torch.searchsorted(table.flip(0), signal)).clamp(0, len(table) - 1)
    # what it says of its last step, for all that is noisier
    least = table[-1].sqrt() / (table[-1].sqrt() + (1 - table[-1]).sqrt())
    share = (1 - sigma).clamp(min=float(least))[:, None, None, None]
    plain = x / (share**2 + (1 - share) ** 2).sqrt()
    hidden = reader(torch.cat([ids, empty])).last_hidden_state
    hidden = torch.cat([hidden[:-1], hidden[-1:].expand(len(ids), -1, -1)])
    conditional, unconditional = (
        unet(torch.cat([plain, plain]), torch.cat([times, times]), hidden).sample.float().chunk(2)
    )
    noise = unconditional + GUIDANCE * (conditional - unconditional)
    found: Tensor = (noise - x) / share
    return found


def distil(
    folder: Path,
    stage: str,
    clip_tokenizer: Any,
    t5_tokenizer: Any,
    latents: Tensor,
    mini: tuple[Any, Any],
    steps: int | None = None,
    batch: int = 64,
) -> None:
    """Train the average of the stage before towards `mini`'s guided velocity; resumable.

    `mini` finds the object in 99 % of its pictures, and its predictions have none of the noise that pictures have as a
    target. The exponential moving average of the weights is the model.

    Args:
        folder: Folder with the checkpoint of the stage before; this stage's checkpoint and log are written there.
        stage: One of :data:`DISTIL_STAGES`.
        clip_tokenizer: CLIP's tokenizer.
        t5_tokenizer: T5's tokenizer.
        latents: Latents of the training pictures.
        mini: UNet and text encoder of `mini`.
        steps: Where to stop. Default: the stage's length.
        batch: Pictures a step.

    Reference: Meng et al. 2023, arXiv 2210.03142, stage one.
    """
    settings = DISTIL_STAGES[stage]
    steps = settings.steps if steps is None else steps
    torch.manual_seed(settings.seed)
    begun = torch.load(folder / f"{settings.before}.pt", weights_only=True)["modules"]
    clip, t5 = new_text_encoders(len(clip_tokenizer), len(t5_tokenizer))
    transformer = new_transformer()
    parts = {"transformer": transformer, "clip": clip, "t5": t5}
    for name, part in parts.items():
        part.load_state_dict(begun[f"average_{name}"])
    averages = Averages(parts, most=0.99)
    optimizer = (muon if settings.muon else _adamw)(averages, settings.peak_lr)
    run = Run(
        folder,
        stage,
        averages.modules(),
        optimizer,
        steps,
        settings.peak_lr,
        save_every=50,
        schedule=lambda step: warm_cosine(step, settings.steps, settings.peak_lr),
    )
    batches = _Batches(folder, clip_tokenizer, t5_tokenizer, latents, batch)
    while run.step < steps:
        clean, noise, sigma, clip_ids, t5_ids = batches.at(run.step, settings.seed, 0.03, DISTIL_SHIFT)
        x = _noisy(clean, noise, sigma)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = _guided_by_mini(mini, x, sigma, clip_ids, batches.empty_clip)
            velocity = predict(transformer, x, sigma, text_states(clip, t5, clip_ids, t5_ids))
        difference = velocity.float() - wanted
        loss = (difference.square().mean((1, 2, 3)) + coarse_error(difference)).mean()
        run.update(loss, after=lambda: averages.follow(run.step))
        if run.step % 25 == 0:
            run.log(velocity_mse=difference.detach().square().mean().item())


def pack(folder: Path, target: Path, clip_tokenizer: Any, stage: str) -> int:
    """Write the parts that `mini-flow` does not share with `mini`, in fp16, with the logs; return their bytes.

    Args:
        folder: Folder of the checkpoints.
        target: Folder of the packed model.
        clip_tokenizer: CLIP's tokenizer.
        stage: The stage whose averages are packed.
    """
    target.mkdir(parents=True, exist_ok=True)
    t5_tokenizer = load_tokenizer(folder / "flow-tokenizer")
    trained = torch.load(folder / f"{stage}.pt", weights_only=True)["modules"]
    clip, t5 = new_text_encoders(len(clip_tokenizer), len(t5_tokenizer))
    transformer = new_transformer()
    for name, part in (("transformer", transformer), ("clip", clip), ("t5", t5)):
        part.load_state_dict(trained[f"average_{name}"])
    for name, part in (("transformer", transformer), ("text_encoder", clip), ("text_encoder_2", t5)):
        part.half().save_pretrained(target / name, variant="fp16")
    shutil.copytree(folder / "flow-tokenizer", target / "tokenizer_2", dirs_exist_ok=True)
    for log in folder.glob("flow-*.log.jsonl"):
        shutil.copy(log, target / log.name)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
