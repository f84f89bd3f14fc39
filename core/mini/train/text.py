"""Stage `text`: pretrain the text encoder to predict the labels that a caption names.

CLIP's text encoder is trained against images; here the labels replace the images. The pretraining saves the UNet stage
its slowest part, learning to use the text; that stage then trains both together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..config import TEXT_WIDTH, TOKENS, new_text_encoder
from ..vocabulary import ATTRIBUTES, BACKGROUNDS
from ..world import LABELS, Scene, labels
from . import dataset
from .run import Run

_SCHEDULE = 700  # steps of the schedule; the UNet stage takes over earlier
_SHORT = 40  # longer captions do not occur; the causal encoder's states do not depend on what follows


def targets(scene: Scene, text: str) -> list[int]:
    """Return the classes of categories, background and attributes; -100 for what the caption does not name."""
    row = dataset.label_indices(labels(scene))
    if scene.colour not in text:
        row[list(LABELS).index("colour")] = -100
    background = scene.background if f"{scene.background} background" in text else None
    row.append(0 if background is None else 1 + list(BACKGROUNDS).index(background))
    return row + [int(f"with a {name}" in text) for name in ATTRIBUTES]


def train(folder: Path, tokenizer: Any, pictures: int, steps: int = 200, batch: int = 96) -> None:
    """Train for `steps` steps of `batch` captions, the first part of a longer schedule; resumable."""
    torch.manual_seed(3)
    vocabulary = len(tokenizer)
    model = new_text_encoder(vocabulary)
    sizes = [len(c) for c in LABELS.values()] + [1 + len(BACKGROUNDS)] + [2] * len(ATTRIBUTES)
    heads = nn.Linear(TEXT_WIDTH, sum(sizes))
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=1e-3, weight_decay=1e-2)
    run = Run(folder, "text", {"model": model, "heads": heads}, optimizer, _SCHEDULE, peak_lr=1e-3)
    model.train()
    while run.step < steps:
        rng = np.random.default_rng((17, run.step))
        texts, rows = [], []
        for index in rng.integers(0, pictures, batch):
            scene = dataset.scene(int(index))
            texts.append(dataset.captions(scene, int(index), 6)[int(rng.integers(6))])
            rows.append(targets(scene, texts[-1]))
        ids = torch.tensor(tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True).input_ids)[
            :, :_SHORT
        ]
        ends = (ids == vocabulary - 1).int().argmax(1)
        states = model(ids).last_hidden_state
        # read out the end-of-text state and one padding state, because the UNet attends to both
        later = torch.from_numpy(rng.integers(0, _SHORT, batch)).maximum(ends)
        read_out = torch.stack([states[torch.arange(batch), ends], states[torch.arange(batch), later]])
        classes = torch.tensor(rows)
        loss = torch.zeros(())
        for column, logits in enumerate(heads(read_out).split(sizes, dim=-1)):
            both = classes[:, column].repeat(2)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), both, ignore_index=-100)
        run.update(loss)
        if run.step % 50 == 0:
            run.log(loss=loss.item())
