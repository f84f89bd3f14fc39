"""Stage `probe`: a classifier of rendered images that is robust to a generator's artifacts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..probe import Classifier, Probe
from ..world import LABELS, labels, render
from . import dataset
from .autoencoder import to_tensor
from .run import Run

_IGNORE = -100
_NAMES = list(LABELS)


def corrupt(images: Tensor, targets: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Blur, noise, shift and recolour images slightly; destroy one in eight, whose subject becomes *none*.

    Args:
        images: `(n, 3, 128, 128)` in [-1, 1].
        targets: `(n, 4)` class indices in the order of `LABELS`.
        rng: Random generator.
    """
    images, targets = images.clone(), targets.clone()
    subject = [_NAMES.index(k) for k in ("object", "identity", "colour")]
    style = _NAMES.index("style")
    for row in range(len(images)):
        roll = rng.random()
        if roll < 0.3:  # an autoencoder's loss of detail
            factor = int(rng.integers(2, 4))
            small = F.avg_pool2d(images[row : row + 1], factor)
            images[row] = F.interpolate(small, size=128, mode="bilinear", align_corners=False)[0]
        if rng.random() < 0.35:
            images[row] += torch.from_numpy(rng.normal(0, rng.uniform(0.02, 0.25), (3, 128, 128)).astype(np.float32))
        if rng.random() < 0.3:
            gain, shift = rng.uniform(0.85, 1.1), rng.uniform(-0.08, 0.08)
            images[row] = images[row] * gain + shift
        if rng.random() < 0.4:
            images[row] = torch.roll(images[row], tuple(int(k) for k in rng.integers(-6, 7, 2)), (1, 2))
        if rng.random() < 0.125:
            kind = rng.integers(3)
            if kind == 0:  # scrambled blocks
                blocks = images[row].unfold(1, 32, 32).unfold(2, 32, 32).reshape(3, 16, 32, 32)
                blocks = blocks[:, torch.from_numpy(rng.permutation(16))]
                images[row] = blocks.reshape(3, 4, 4, 32, 32).permute(0, 1, 3, 2, 4).reshape(3, 128, 128)
                targets[row, style] = _IGNORE
            elif kind == 1:  # soft blotches of colour
                size = int(rng.integers(2, 7))
                spots = torch.from_numpy(rng.uniform(-1, 1, (1, 3, size, size)).astype(np.float32))
                images[row] = F.interpolate(spots, size=128, mode="bicubic", align_corners=False)[0]
                targets[row, style] = 0
            else:  # a blur that leaves no shape
                small = F.avg_pool2d(images[row : row + 1], 32)
                images[row] = F.interpolate(small, size=128, mode="bicubic", align_corners=False)[0]
                targets[row, style] = _IGNORE
            targets[row, subject] = 0
    return images.clamp(-1, 1), targets


def empty_pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Render images of a style without a subject."""
    from ..vocabulary import BACKGROUNDS
    from ..world import Labels, Scene

    rng = np.random.default_rng(seed)
    pictures, targets = [], []
    for _ in range(count):
        style = LABELS["style"][int(rng.integers(4, len(LABELS["style"])))]
        if rng.random() < 0.2:
            style = "none"
        background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
        pictures.append(render(Scene(style=style, background=background, seed=int(rng.integers(2**31)))))
        targets.append(dataset.label_indices(Labels(style=style)))
    return to_tensor(np.stack(pictures)), torch.tensor(targets)


def train(folder: Path, pictures: np.ndarray, steps: int = 1300, batch: int = 40) -> None:
    """Train for `steps` steps; resumable."""
    torch.manual_seed(2)
    model = Probe()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    run = Run(folder, "probe", {"model": model}, optimizer, steps, peak_lr=2e-3)
    every = torch.from_numpy(dataset.label_table(len(pictures)))
    blank, blank_targets = empty_pictures(400, seed=5)
    model.train()
    while run.step < steps:
        rng = np.random.default_rng((13, run.step))
        rows = np.sort(rng.choice(len(pictures), batch - 2, replace=False))
        extra = torch.from_numpy(rng.choice(len(blank), 2, replace=False))
        images = torch.cat([to_tensor(pictures[rows]), blank[extra]])
        images, targets = corrupt(images, torch.cat([every[rows], blank_targets[extra]]), rng)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        parts = [F.cross_entropy(logits[k].float(), targets[:, i], ignore_index=_IGNORE) for i, k in enumerate(_NAMES)]
        run.update(torch.stack(parts).sum())
        if run.step % 100 == 0:
            run.log(**{k: part.item() for k, part in zip(_NAMES, parts, strict=True)})


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the accuracy per category."""
    seen = torch.tensor([dataset.label_indices(found) for found in model.classify(images)])
    return {k: (seen[:, i] == targets[:, i]).float().mean().item() for i, k in enumerate(_NAMES)}


def held_out(count: int) -> tuple[Tensor, Tensor]:
    """Render images outside the training set, including held-out combinations."""
    scenes = [dataset.scene(i, dataset.HELD_OUT_SEED, training=False) for i in range(count)]
    targets = torch.tensor([dataset.label_indices(labels(s)) for s in scenes])
    return to_tensor(np.stack([render(s) for s in scenes])), targets
