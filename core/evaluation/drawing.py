"""Drawing many pictures: with and without patches, in the faster precision, each picture drawn and looked at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import RequestError
from ..mini.world import Labels
from ..models.images import from_bytes, to_bytes
from ..models.latent_diffusion import LatentDiffusion
from ..models.safe_guidance import SafetyGuidance
from ..models.text_encoders import encode_prompts
from ..patch.patch import Patch
from ..progress import Progress, ProgressEvent, report_progress
from .processes import SINGLE_PROCESS, ProcessGroup

__all__ = [
    "ImageClassifier",
    "LabeledImage",
    "Picture",
    "SampleCache",
    "SamplingSettings",
    "Variant",
    "draw",
    "faster_precision",
    "faster_threads",
]

PRECISIONS = ("auto", "float32", "bfloat16")
# bf16 also moves the pictures a little, so it must be worth it
GAIN = 1.25
_TIMED = 8


class ImageClassifier(Protocol):
    """Says what it sees in pictures ``(n, 3, 128, 128)`` in [-1, 1]: one :class:`Labels` each."""

    def classify(self, images: Tensor) -> list[Labels]: ...


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are drawn: ``steps`` of a ``sampler``, ``guidance``, how many at a time, the UNet's precision.

    ``precision="auto"`` times a few pictures in fp32 and under bf16 autocast and takes bf16 where that is clearly
    faster; on a CPU it then times one thread against all of torch's (on a busy machine many threads mostly wait for
    each other). ``threads`` says how many instead; they are set while a batch is drawn and put back after it.
    """

    steps: int = 16
    guidance: float = 2.5
    batch: int = 32
    precision: str = "auto"
    sampler: str = "dpm++"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise RequestError(f"The precision '{self.precision}' is not known: choose one of {', '.join(PRECISIONS)}.")
        if self.batch < 1:
            raise RequestError(f"The batch must be at least 1, not {self.batch}.")
        if self.threads is not None and self.threads < 1:
            raise RequestError(f"The number of threads must be at least 1, not {self.threads}.")

    def resolved(self, model: LatentDiffusion) -> SamplingSettings:
        """The same with a precision that is no longer ``"auto"``, and the threads timed with it."""
        if self.precision != "auto":
            return self
        # which one is faster shows on a few pictures; the slower one would take seconds for all of them
        precision = faster_precision(model, min(self.batch, _TIMED))
        threads = faster_threads(model, precision, self.batch) if self.threads is None else self.threads
        return replace(self, precision=precision, threads=threads)


@dataclass(frozen=True)
class Picture:
    """What is drawn: a prompt and the seed of its noise."""

    prompt: str
    seed: int


@dataclass(frozen=True, eq=False)
class Variant:
    """What draws it: the model with ``patches`` on it (each at a strength), a negative prompt, safety guidance."""

    patches: tuple[tuple[Patch, float], ...] = ()
    negative: str = ""
    safe: SafetyGuidance | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for variants that draw the same pictures; patches are told apart as objects."""
        return (self.negative, self.safe, *((id(patch), strength) for patch, strength in self.patches))


@dataclass(frozen=True)
class LabeledImage:
    """A picture ``(3, H, W)`` uint8 and what the probe finds in it."""

    picture: Tensor
    labels: Labels


@torch.no_grad()
def _seconds(model: LatentDiffusion, precision: str, batch: int, rounds: int, warm: int = 1) -> float:
    """The shortest of ``rounds`` guided steps of ``batch`` pictures, after ``warm`` that do not count."""
    states = encode_prompts(model.text, [""]).index([0] * 2 * batch)
    noise = torch.randn(2 * batch, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    steps = torch.full((2 * batch,), model.train_steps // 2)
    times = []
    for _ in range(warm + rounds):
        began = time.perf_counter()
        with _autocast(model, precision):
            # taking a value back waits for a device that works ahead
            float(model.predict_noise(noise, steps, states).sum())
        times.append(time.perf_counter() - began)
    return min(times[warm:])


def faster_precision(model: LatentDiffusion, batch: int = 32, rounds: int = 2) -> str:
    """``"bfloat16"`` where a guided step of ``batch`` pictures is clearly faster so, else ``"float32"``."""
    if model.dtype != torch.float32:
        return "float32"  # the model's own dtype then decides
    single, half = (_seconds(model, precision, batch, rounds) for precision in ("float32", "bfloat16"))
    return "bfloat16" if single > GAIN * half else "float32"


def faster_threads(model: LatentDiffusion, precision: str, batch: int = 32, rounds: int = 2) -> int:
    """One thread or as many as torch has now, whichever draws ``batch`` pictures sooner; the latter on a GPU."""
    now = torch.get_num_threads()
    if model.device.type != "cpu" or now == 1:
        return now
    # timed for the precision already, mostly: nothing is left to warm up
    together = _seconds(model, precision, batch, rounds, 0)
    with torch_threads(1):
        alone = _seconds(model, precision, batch, rounds, 0)
    return 1 if alone < together else now


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many of torch's threads for the length of a ``with`` block (``None``: as many as there are)."""
    before = torch.get_num_threads()
    if count in (None, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _autocast(model: LatentDiffusion, precision: str) -> contextlib.AbstractContextManager[object]:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, torch.bfloat16)


@contextlib.contextmanager
def patched(model: LatentDiffusion, patches: Sequence[tuple[Patch, float]]) -> Iterator[None]:
    """All of the patches on the model for the length of a ``with`` block."""
    with contextlib.ExitStack() as stack:
        for patch, strength in patches:
            stack.enter_context(patch.applied(model.survey, strength))
        yield


@torch.no_grad()
def draw(
    model: LatentDiffusion,
    pictures: Sequence[Picture],
    variant: Variant | None = None,
    sampling: SamplingSettings | None = None,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Pictures, a batch after the other, ``(n, 3, H, W)`` uint8 on the CPU: what a file would hold.

    The patches are on the model only while a batch is drawn. ``progress`` counts steps of single batches from 0.
    """
    variant, sampling = variant or Variant(), (sampling or SamplingSettings()).resolved(model)
    for start in range(0, len(pictures), sampling.batch):
        chunk = pictures[start : start + sampling.batch]
        with torch_threads(sampling.threads), patched(model, variant.patches), _autocast(model, sampling.precision):
            latents = model.sample(
                [picture.prompt for picture in chunk],
                [picture.seed for picture in chunk],
                steps=sampling.steps,
                guidance=sampling.guidance,
                negative=variant.negative,
                batch=sampling.batch,
                progress=progress,
                sampler=sampling.sampler,
                safety=variant.safe,
            )
        with torch_threads(sampling.threads):
            images = to_bytes(model.decode(latents, batch=sampling.batch))
        yield images


class SampleCache:
    """Pictures asked for by several measurements, each drawn and looked at once.

    :meth:`want` says what will be needed, :meth:`make` draws it, :meth:`seen` gives it. So the pictures of the unedited
    model serve every concept that is measured beside it. With a ``processes`` of several processes each draws its part,
    and all of them have everything afterwards.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        probe: ImageClassifier,
        sampling: SamplingSettings,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.model, self.probe, self.sampling, self.processes = model, probe, sampling, processes
        self._variants: dict[tuple[object, ...], Variant] = {}
        self._pending: dict[tuple[object, ...], dict[Picture, None]] = {}
        self._images: dict[tuple[tuple[object, ...], Picture], LabeledImage] = {}

    def request(self, variant: Variant, pictures: Sequence[Picture]) -> None:
        """Ask for pictures of a variant; what is there or already asked for is not drawn again."""
        self._variants.setdefault(variant.key, variant)
        wanted = self._pending.setdefault(variant.key, {})
        wanted.update((picture, None) for picture in pictures if (variant.key, picture) not in self._images)

    def generate(self, progress: Progress | None = None) -> None:
        """Draw and look at everything asked for. Progress counts pictures' steps over all of it."""
        if not any(self._pending.values()):
            return
        self.sampling = sampling = self.processes.broadcast(lambda: self.sampling.resolved(self.model))
        batches = [
            (key, list(wanted)[start : start + sampling.batch])
            for key, wanted in self._pending.items()
            for start in range(0, len(wanted), sampling.batch)
        ]
        made: list[tuple[int, Tensor, list[Labels]]] = []
        done = 0

        def inner(event: ProgressEvent) -> None:
            at = done * sampling.steps + len(pictures) * event.step
            report_progress(progress, ProgressEvent(at, total * sampling.steps, message=f"drawing {total} pictures"))

        with self.processes.split(range(len(batches))) as mine:
            total = sum(len(batches[number][1]) for number in mine)
            for number in mine:
                key, pictures = batches[number]
                (images,) = draw(self.model, pictures, self._variants[key], sampling, inner)
                made.append((number, images, self.probe.classify(from_bytes(images))))
                done += len(pictures)
        for number, images, found in self.processes.gather(made):
            key, pictures = batches[number]
            for picture, image, labels in zip(pictures, images, found, strict=True):
                self._images[key, picture] = LabeledImage(image, labels)
        self._pending.clear()

    def discard(self, variant: Variant) -> None:
        """Let go of a variant's pictures, which on large models fill the memory."""
        self._pending.pop(variant.key, None)
        self._variants.pop(variant.key, None)
        self._images = {at: seen for at, seen in self._images.items() if at[0] != variant.key}

    def get(self, variant: Variant, pictures: Sequence[Picture]) -> list[LabeledImage]:
        """What was asked for and made, in this order."""
        return [self._images[variant.key, picture] for picture in pictures]
