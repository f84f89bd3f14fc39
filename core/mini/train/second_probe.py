"""Stage `second-probe`: a classifier of another architecture that takes no half or broken subject for the subject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ..figures import Layer
from ..second_probe import SecondProbe
from ..shapes import SIZE
from ..vocabulary import NONE
from ..world import LABELS, Labels, labels, render
from . import dataset
from .autoencoder import to_tensor
from .probe import _IGNORE, corrupt, empty_pictures
from .run import Run

NAME = "second-probe"
STEPS, PEAK_LR = 1500, 3e-3
BROKEN = 6000
_SEED = 61
_NAMES = list(LABELS)


def half(layers: list[Layer], rng: np.random.Generator) -> list[Layer]:
    """Keep the part of a subject on one side of a line through it."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    cover = np.maximum.reduce([layer.mask for layer in layers])
    total = max(float(cover.sum()), 1.0)
    across = np.cos(angle) * x + np.sin(angle) * y
    middle = float((cover * across).sum()) / total + rng.uniform(-4, 4)
    side = np.clip(across - middle + 0.5, 0, 1)
    return [replace(layer, mask=layer.mask * side) for layer in layers]


def broken(layers: list[Layer], rng: np.random.Generator) -> list[Layer]:
    """Cut a subject into squares and keep half of them, each moved a little."""
    size = int(rng.integers(16, 28))
    kept = [
        (row, column, rng.integers(-10, 11), rng.integers(-10, 11))
        for row in range(0, SIZE, size)
        for column in range(0, SIZE, size)
        if rng.random() < 0.55
    ]
    found = []
    for layer in layers:
        mask = np.zeros_like(layer.mask)
        for row, column, down, right in kept:
            piece = np.zeros_like(mask)
            piece[row : row + size, column : column + size] = layer.mask[row : row + size, column : column + size]
            mask = np.maximum(mask, np.roll(piece, (down, right), (0, 1)))
        found.append(replace(layer, mask=mask))
    return found


def blob(layers: list[Layer], rng: np.random.Generator) -> list[Layer]:
    """Replace a subject by a smooth shape of about its size and of its colours."""
    cells = int(rng.integers(3, 6))
    coarse = torch.from_numpy(rng.normal(0, 1, (1, 1, cells, cells)).astype(np.float32))
    smooth = F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic", align_corners=False)[0, 0].numpy()
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    smooth = smooth - (((x - SIZE / 2) ** 2 + (y - SIZE / 2) ** 2) / (0.3 * SIZE) ** 2) ** 2
    area = float(np.maximum.reduce([layer.mask for layer in layers]).sum())
    edge = float(np.quantile(smooth, 1 - np.clip(area / SIZE**2, 0.05, 0.5)))
    mask = np.clip((smooth - edge) * 12 + 0.5, 0, 1).astype(np.float32)
    colours = [layer.colour for layer in layers]
    if len(colours) == 1:
        return [Layer(mask, colours[0])]
    # a person's colours lie on top of each other
    cut = int(rng.integers(SIZE // 3, 2 * SIZE // 3))
    lower = mask.copy()
    lower[:cut] = 0
    first, second = rng.choice(len(colours), 2, replace=False)
    return [Layer(mask, colours[first]), Layer(lower, colours[second])]


WAYS: tuple[Callable[[list[Layer], np.random.Generator], list[Layer]], ...] = (half, broken, blob)


def broken_picture(index: int, seed: int = _SEED) -> np.ndarray:
    """Render a scene whose subject is half, broken or a blob."""
    rng = np.random.default_rng((seed, index))
    scene = dataset.scene(index, seed)
    return render(scene, lambda layers: WAYS[index % len(WAYS)](layers, rng) if layers else layers)


def broken_labels(index: int, seed: int = _SEED) -> Labels:
    """The labels of :func:`broken_picture`: the style and the colour, and no subject."""
    return replace(labels(dataset.scene(index, seed)), object=NONE, identity=NONE)


def train(folder: Path, pictures: np.ndarray, steps: int = STEPS, batch: int = 48) -> None:
    """Train for `steps` steps, one image in four with a destroyed subject; resumable."""
    torch.manual_seed(_SEED)
    # depthwise convolutions take half the time in this layout
    model = SecondProbe().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stubs
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=5e-2)
    run = Run(folder, NAME, {"model": model}, optimizer, steps, peak_lr=PEAK_LR)
    every = torch.from_numpy(dataset.label_table(len(pictures)))
    path = folder / "broken.npy"
    if not path.exists():
        np.save(path, np.stack([broken_picture(index) for index in range(BROKEN)]))
    ruins = np.load(path, mmap_mode="r")
    ruined = torch.tensor([dataset.label_indices(broken_labels(index)) for index in range(BROKEN)])
    # the colour of a piece is not asked for
    ruined[:, _NAMES.index("colour")] = _IGNORE
    blank, blank_targets = empty_pictures(400, seed=_SEED)
    few = batch // 4
    model.train()
    while run.step < steps:
        rng = np.random.default_rng((_SEED, 2, run.step))
        rows = np.sort(rng.choice(len(pictures), batch - few - 2, replace=False))
        images, targets = corrupt(to_tensor(pictures[rows]), every[rows], rng)
        pieces = np.sort(rng.choice(BROKEN, few, replace=False))
        # the small changes that a generator makes, without the destruction of the whole image
        spoiled, spoiled_targets = to_tensor(ruins[pieces]), ruined[pieces]
        spoiled = (spoiled + 0.05 * torch.from_numpy(rng.normal(0, 1, spoiled.shape).astype(np.float32))).clamp(-1, 1)
        extra = torch.from_numpy(rng.choice(len(blank), 2, replace=False))
        images = torch.cat([images, spoiled, blank[extra]])
        targets = torch.cat([targets, spoiled_targets, blank_targets[extra]])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        parts = [F.cross_entropy(logits[k].float(), targets[:, i], ignore_index=_IGNORE) for i, k in enumerate(_NAMES)]
        run.update(torch.stack(parts).sum())
        if run.step % 100 == 0:
            run.log(**{k: part.item() for k, part in zip(_NAMES, parts, strict=True)})


def trained(folder: Path) -> SecondProbe:
    """Load the classifier from its latest checkpoint."""
    model = SecondProbe()
    model.load_state_dict(torch.load(folder / f"{NAME}.pt", weights_only=True)["modules"]["model"])
    return model.eval()


def pack(folder: Path, target: Path) -> int:
    """Write `second_probe.safetensors` in fp16 and the log; returns the size in bytes."""
    path = target / "second_probe.safetensors"
    save_file(
        {k: v.half().clone(memory_format=torch.contiguous_format) for k, v in trained(folder).state_dict().items()},
        path,
    )
    log = folder / f"{NAME}.log.jsonl"
    (target / log.name).write_text(log.read_text(encoding="utf-8"), encoding="utf-8")
    return path.stat().st_size
