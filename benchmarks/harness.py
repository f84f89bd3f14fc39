"""What the benchmarks share: a resumable table, the cost of a fit, progress, cached pictures and intervals."""

from __future__ import annotations

import csv
import ctypes
import gc
import io
import math
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TimeRemainingColumn
from torch import Tensor, nn

from forget_concept.core.errors import RequestError
from forget_concept.core.evaluation import (
    ImageClassifier,
    LabeledImage,
    Picture,
    SampleCache,
    SamplingSettings,
    Variant,
    wilson,
)
from forget_concept.core.files.workspace import Workspace, key_of
from forget_concept.core.files.writing import write_bytes
from forget_concept.core.mini.world import LABELS, Labels
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.survey import survey
from forget_concept.core.progress import ProgressEvent

STATM = Path("/proc/self/statm")


# -- a table in a file --------------------------------------------------------------------------------------------


class Table:
    """A CSV file with a fixed header; every row is on disk before the next run starts."""

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str]) -> None:
        """Open or create the table.

        Args:
            key: The columns that identify a run.

        Raises:
            RequestError: If the file has another header.
        """
        self.path, self.columns, self.key = path, list(columns), list(key)
        self.rows: list[dict[str, str]] = []
        if path.exists():
            text = path.read_text(encoding="utf-8")
            if not text.endswith("\n"):  # an incomplete row of an interrupted run
                text = text[: text.rfind("\n") + 1]
                path.write_text(text, encoding="utf-8")
            found = csv.DictReader(text.splitlines())
            if text and found.fieldnames != self.columns:
                raise RequestError(f"'{path}' is a table with other columns: choose another --out, or move the file.")
            self.rows = list(found)
        self._there = {self._key(row) for row in self.rows}

    def _key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(_cell(row[name]) for name in self.key)

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether the table has a row with the key of ``row``."""
        return self._key(row) in self._there

    def row(self, key: Mapping[str, Any]) -> dict[str, str]:
        """The row with a key.

        Raises:
            KeyError: If there is none.
        """
        wanted = self._key(key)
        for row in self.rows:
            if self._key(row) == wanted:
                return row
        raise KeyError(wanted)

    def fill(self, key: Mapping[str, Any], cells: Mapping[str, Any]) -> None:
        """Set cells of an existing row; the file is replaced atomically."""
        row = self.row(key)
        if unknown := set(cells) - set(self.columns) | set(cells) & set(self.key):
            raise ValueError(f"{sorted(unknown)} cannot be filled in a table of {sorted(self.columns)}")
        row |= {name: _cell(value) for name, value in cells.items()}
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_bytes(self.path, text.getvalue().encode())

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row, which must have exactly the table's columns."""
        if set(row) != set(self.columns):
            raise ValueError(f"a row of {sorted(row)} does not fit a table of {sorted(self.columns)}")
        cells = {name: _cell(row[name]) for name in self.columns}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists() or self.path.stat().st_size == 0
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(cells)
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(cells)
        self._there.add(self._key(cells))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


# -- cost of a fit ------------------------------------------------------------------------------------------------


class Passes:
    """Counts the samples (rows of a batch) in forward and backward passes of a UNet inside a ``with`` block.

    A backward pass counts if a gradient reaches the UNet's prediction or any of its cross-attentions, so a loss on
    attention maps counts too; a second backward pass through the same forward pass counts again.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.forward = self.backward = 0
        self._reached: list[Tensor] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Passes:
        self._hooks = [site.module.register_forward_hook(self._site) for site in survey(self.unet)]
        self._hooks.append(self.unet.register_forward_hook(self._whole))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._reached.clear()

    def _site(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._reached += _differentiable(output)

    def _whole(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        rows = len(first)
        self.forward += rows
        reached, self._reached = [*self._reached, *_differentiable(first)], []
        if reached:

            def back(_: Tensor) -> None:
                self.backward += rows

            torch.autograd.graph.register_multi_grad_hook(reached, back, mode="any")


def _differentiable(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, tuple) else (output,)
    return [part for part in parts if isinstance(part, Tensor) and part.requires_grad]


class PeakMemory:
    """Measures the peak memory inside a ``with`` block as ``bytes``; ``None`` where it cannot be measured.

    On CUDA, this is torch's maximum of allocated memory, including the model. On a CPU, it is the growth of the
    process' resident set since the start, sampled every 5 ms, without the model, which is loaded before. The
    allocator's free memory is returned to the system first where possible, because a fit could reuse it unnoticed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        elif STATM.exists():
            _release_free_memory()
            self._start = self._most = _resident()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._most = max(self._most, _resident())

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._thread is not None:
            self._stop.set()
            self._thread.join()
            self.bytes = max(self._most, _resident()) - self._start


def _resident() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _release_free_memory() -> None:
    """Ask the allocator (tcmalloc, or the C library's) to return its free pages; others are not supported."""
    here = ctypes.CDLL(None)
    for name, args in (("MallocExtension_ReleaseFreeMemory", ()), ("malloc_trim", (0,))):
        if (call := getattr(here, name, None)) is not None:
            call(*args)


@dataclass
class Cost:
    """Seconds, samples in forward and backward passes, and peak memory in bytes of a ``with`` block."""

    seconds: float = 0.0
    forward: int = 0
    backward: int = 0
    peak: int | None = None


@contextmanager
def costing(model: LatentDiffusion) -> Iterator[Cost]:
    """Measure the cost of a ``with`` block; the yielded :class:`Cost` is filled in when the block ends."""
    cost = Cost()
    with Passes(model.unet) as passes, PeakMemory(model.device) as memory:
        _wait(model.device)
        began = time.perf_counter()
        yield cost
        _wait(model.device)
        cost.seconds = time.perf_counter() - began
    cost.forward, cost.backward, cost.peak = passes.forward, passes.backward, memory.bytes


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The product name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


# -- progress -----------------------------------------------------------------------------------------------------


class RunProgress:
    """Context manager with two progress bars on standard error: all runs, and the current run."""

    def __init__(self, total: int) -> None:
        self.console = Console(stderr=True)
        self._bar = Bar(*Bar.get_default_columns(), TimeRemainingColumn(), console=self.console, transient=True)
        self._whole, self._task = self._bar.add_task("runs", total=total), self._bar.add_task("", total=None)
        self.name = ""

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: ProgressEvent) -> None:
        self._bar.update(
            self._task, description=f"{self.name}: {event.message}", total=event.total, completed=event.step
        )

    def say(self, text: str, wrong: bool = False) -> None:
        self.console.print(text, style="red" if wrong else None, highlight=False, markup=False, soft_wrap=True)

    def done(self) -> None:
        """Advance the bar of all runs by one."""
        self._bar.advance(self._whole)


# -- pictures of the unedited model -------------------------------------------------------------------------------


class SharedSampleCache(SampleCache):
    """Sample cache that keeps the unedited model's images for all measurements, and in ``workspace`` for later runs.

    :meth:`release` drops all other images, which belong to a single measurement.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        probe: ImageClassifier,
        sampling: SamplingSettings,
        workspace: Workspace | None = None,
        by: str = "",
    ) -> None:
        """``by`` is a key of what else the labels of a picture depend on, such as the probe's weights."""
        super().__init__(model, probe, sampling.resolved(model))
        self.workspace = workspace
        s = self.sampling
        self._about = [by, model.device.type, s.steps, s.guidance, s.precision, s.sampler]

    def generate(self, progress: Any = None) -> None:
        """Generate the requested images that are not in the workspace."""
        plain = Variant().key
        if self.workspace is None or not self._pending.get(plain):
            super().generate(progress)
            return
        candidates = list(self._pending[plain])
        for picture in candidates:
            if (found := self.workspace.load("pictures", self._key(picture))) is not None:
                labels = Labels(**{c: LABELS[c][i] for c, i in zip(LABELS, found["labels"].tolist(), strict=True)})
                self._images[plain, picture] = LabeledImage(found["picture"], labels)
                del self._pending[plain][picture]
        drawn = list(self._pending[plain])
        super().generate(progress)
        for picture in drawn:
            seen = self._images[plain, picture]
            labels = torch.tensor([LABELS[c].index(getattr(seen.labels, c)) for c in LABELS])
            self.workspace.save(
                "pictures", self._key(picture), {"picture": seen.picture.contiguous(), "labels": labels}
            )

    def _key(self, picture: Picture) -> str:
        return key_of(self.model.model_hash, self._about, picture.prompt, picture.seed)

    def release(self) -> None:
        """Drop all images but those of the unedited model."""
        plain = Variant().key
        self._images = {key: seen for key, seen in self._images.items() if key[0] == plain}
        self._variants = {key: variant for key, variant in self._variants.items() if key == plain}


# -- intervals of several runs ------------------------------------------------------------------------------------

# Student's t, 97.5 %, for 1 to 30 degrees of freedom
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def mean_interval(values: Sequence[float], n: int) -> tuple[float, float, float]:
    """Mean of several runs' shares, each of ``n`` trials, and its 95 % interval: ``(mean, low, high)``.

    The interval is Wilson's over all trials, widened to Student's over the means of the runs if there are several,
    because pictures of one concept are more alike than concepts are. A ratio above 1 counts as 1 in Wilson's interval.
    """
    runs, mean = len(values), sum(values) / len(values)
    trials = runs * n
    low, high = wilson(round(min(max(mean, 0.0), 1.0) * trials), trials)
    if runs > 1:
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (runs - 1) / runs)
        half = (_T[runs - 2] if runs - 2 < len(_T) else 2.0) * spread
        low, high = min(low, mean - half), max(high, mean + half)
    return mean, min(max(low, 0.0), mean), max(high, mean)
