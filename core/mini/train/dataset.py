"""The training images, rendered once into a memory-mapped array."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..shapes import SIZE
from ..world import LABELS, Labels, Scene, caption, labels, render, sample_scene

SEED = 20260000  # image i of the training set is a pure function of (SEED, i)
HELD_OUT_SEED = 77000000


def scene(index: int, seed: int = SEED, *, training: bool = True) -> Scene:
    """Return scene `index` of a dataset."""
    return sample_scene(np.random.default_rng((seed, index)), training=training)


def shows(item: Scene, names: Sequence[str]) -> bool:
    """Whether a scene shows one of the named objects, people or styles."""
    return any(name in names for name in (item.shape, item.person, item.style))


def captions(item: Scene, index: int, count: int) -> list[str]:
    """Return `count` captions of a scene, deterministic for an index."""
    rng = np.random.default_rng((SEED, index, 1))
    return [caption(item, rng) for _ in range(count)]


def label_indices(found: Labels) -> list[int]:
    """Return the probe's class index of each category, in the order of `LABELS`."""
    return [names.index(getattr(found, category)) for category, names in LABELS.items()]


def _draw(job: tuple[str, int, int, int]) -> int:
    path, total, start, end = job
    pictures = np.load(path, mmap_mode="r+")
    assert pictures.shape[0] == total
    for index in range(start, end):
        pictures[index] = render(scene(index))
    return end - start


def draw(path: Path, count: int, workers: int | None = None) -> Iterator[int]:
    """Render `count` training images into `path` (`.npy`, `(count, 128, 128, 3)` uint8), yielding the number done.

    An existing file is kept. The images are written under another name and renamed at the end, so that an existing file
    is always complete.
    """
    if path.exists():
        yield count
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(count, SIZE, SIZE, 3))
    array.flush()
    jobs = [(str(partial), count, i, min(i + 200, count)) for i in range(0, count, 200)]
    done = 0
    with multiprocessing.get_context("spawn").Pool(workers or os.cpu_count()) as pool:
        for finished in pool.imap_unordered(_draw, jobs):
            done += finished
            yield done
    os.replace(partial, path)


def label_table(count: int) -> np.ndarray:
    """Return the label indices of the first `count` training scenes, `(count, 4)` int64."""
    return np.array([label_indices(labels(scene(i))) for i in range(count)], dtype=np.int64)
