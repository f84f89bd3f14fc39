"""Stage `text`: pretrain text encoders to predict the labels that a caption names.

CLIP's text encoder is trained against images; here the labels replace the images. The pretraining saves the next stage
its slowest part, learning to use the text; that stage then trains both together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TOKENS, new_text_encoder
from ..vocabulary import ATTRIBUTES, BACKGROUNDS
from ..world import LABELS, Scene, labels
from . import dataset
from .run import Run

_SCHEDULE = 700  # steps of the schedule; the next stage takes over earlier
_SHORT = 40  # longer captions do not occur; a causal encoder's states do not depend on what follows

# ids (n, tokens), positions (n,) of the end of text and (n,) of a later token -> what the labels are read from, each
# (readings, n, width)
ReadOut = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]


def targets(scene: Scene, text: str) -> list[int]:
    """Return the classes of categories, background and attributes; -100 for what the caption does not name."""
    row = dataset.label_indices(labels(scene))
    if scene.colour not in text:
        row[list(LABELS).index("colour")] = -100
    background = scene.background if f"{scene.background} background" in text else None
    row.append(0 if background is None else 1 + list(BACKGROUNDS).index(background))
    return row + [int(f"with a {name}" in text) for name in ATTRIBUTES]


def train(
    folder: Path, tokenizer: Any, pictures: int, steps: int = 200, batch: int = 96, without: Sequence[str] = ()
) -> None:
    """Train `mini`'s encoder for `steps` steps of `batch` captions, the first part of a longer schedule; resumable.

    Scenes that show a concept of `without` are left out.
    """
    torch.manual_seed(3)
    model = new_text_encoder(len(tokenizer))

    def read_out(ids: Tensor, ends: Tensor, later: Tensor) -> Sequence[Tensor]:
        # the end-of-text state and one padding state, because the UNet attends to both
        return [at(model(ids).last_hidden_state, ends, later)]

    pretrain(folder, "text", {"model": model}, read_out, tokenizer, pictures, steps, batch, without=without)


def at(states: Tensor, *positions: Tensor) -> Tensor:
    """The states `(n, tokens, d)` at some positions, each `(n,)`: `(len(positions), n, d)`."""
    rows = torch.arange(len(states))
    return torch.stack([states[rows, position] for position in positions])


def pretrain(
    folder: Path,
    name: str,
    encoders: Mapping[str, nn.Module],
    read_out: ReadOut,
    tokenizer: Any,
    pictures: int,
    steps: int,
    batch: int,
    tokens: int = _SHORT,
    without: Sequence[str] = (),
) -> None:
    """Train encoders together with one linear head for each of the things that are read out of them; resumable.

    Args:
        folder: Folder of the checkpoint and the log.
        name: Name of the stage.
        encoders: Encoders by their names in the checkpoint.
        read_out: What the labels are read from.
        tokenizer: Their tokenizer.
        pictures: Number of training pictures, whose captions are read.
        steps: Steps to take, of a schedule of 700.
        batch: Captions a step.
        tokens: Tokens that the encoders are given.
        without: Concepts whose scenes are left out.
    """
    sizes = [len(c) for c in LABELS.values()] + [1 + len(BACKGROUNDS)] + [2] * len(ATTRIBUTES)
    end = tokenizer.eos_token_id
    with torch.no_grad():
        empty = torch.tensor(tokenizer([""], padding="max_length", max_length=TOKENS).input_ids)[:, :tokens]
        start = torch.zeros(1, dtype=torch.long)
        widths = [part.shape[-1] for part in read_out(empty, start, start)]
    heads = nn.ModuleList(nn.Linear(width, sum(sizes)) for width in widths)
    modules = {**encoders, "heads": heads}
    optimizer = torch.optim.AdamW([p for m in modules.values() for p in m.parameters()], lr=1e-3, weight_decay=1e-2)
    run = Run(folder, name, modules, optimizer, _SCHEDULE, peak_lr=1e-3)
    for encoder in encoders.values():
        encoder.train()
    shown = np.array([i for i in range(pictures) if not dataset.shows(dataset.scene(i), without)]) if without else None
    while run.step < steps:
        rng = np.random.default_rng((17, run.step))
        texts, rows = [], []
        for index in rng.integers(0, pictures, batch) if shown is None else rng.choice(shown, batch):
            scene = dataset.scene(int(index))
            texts.append(dataset.captions(scene, int(index), 6)[int(rng.integers(6))])
            rows.append(targets(scene, texts[-1]))
        ids = torch.tensor(tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True).input_ids)
        ids = ids[:, :tokens]
        ends = (ids == end).int().argmax(1)
        later = torch.from_numpy(rng.integers(0, tokens, batch)).maximum(ends)
        classes = torch.tensor(rows)
        loss = torch.zeros(())
        for head, part in zip(heads, read_out(ids, ends, later), strict=True):
            for column, logits in enumerate(head(part).split(sizes, dim=-1)):
                every = classes[:, column].repeat(len(part))
                loss = loss + F.cross_entropy(logits.flatten(0, 1), every, ignore_index=-100)
        run.update(loss)
        if run.step % 50 == 0:
            run.log(loss=loss.item())
    run.save()
