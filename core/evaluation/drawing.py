"""Batched sampling with and without patches, in the faster precision; each image is sampled and classified once."""

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
from ..models.sampling_start import ExtraNoise, Start
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
# bf16 changes the images slightly, so it is used only for a clear speedup
MIN_SPEEDUP = 1.25
_TIMING_BATCH = 8


class ImageClassifier(Protocol):
    """Classifies images ``(n, 3, 128, 128)`` in [-1, 1]."""

    def classify(self, images: Tensor) -> list[Labels]:
        """Return one :class:`Labels` per image."""
        ...


@dataclass(frozen=True)
class SamplingSettings:
    """How images are sampled.

    ``precision="auto"`` times a few images in fp32 and under bf16 autocast, and selects bf16 if it is clearly faster.
    On a CPU it then times one thread against all of torch's threads, because threads contend on a busy machine.

    Args:
        steps: Sampling steps per image.
        guidance: Classifier-free guidance scale.
        batch: Images per batch.
        precision: Precision of the UNet: ``"auto"``, ``"float32"`` or ``"bfloat16"``.
        sampler: Name of the sampler.
        threads: torch threads while a batch is sampled, restored afterwards. ``None`` selects the number by timing.

    Raises:
        RequestError: If the precision is unknown, or ``batch`` or ``threads`` is below 1.
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
        """Return a copy in which ``precision="auto"`` and the thread count are replaced by the fastest choices."""
        if self.precision != "auto":
            return self
        # a small batch is enough to compare precisions, and cheap in the slower one
        precision = faster_precision(model, min(self.batch, _TIMING_BATCH))
        threads = faster_threads(model, precision, self.batch) if self.threads is None else self.threads
        return replace(self, precision=precision, threads=threads)


@dataclass(frozen=True)
class Picture:
    """An image to sample: a prompt and the seed of its initial noise."""

    prompt: str
    seed: int


@dataclass(frozen=True, eq=False)
class Variant:
    """A variant of the model: ``patches`` (each with its strength), a negative prompt, and safety guidance.

    ``model`` is another model that is compared with it.
    """

    patches: tuple[tuple[Patch, float], ...] = ()
    negative: str = ""
    safe: SafetyGuidance | None = None
    model: LatentDiffusion | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Key that is equal for variants that sample the same images; patches are compared by identity."""
        return (self.negative, self.safe, id(self.model), *((id(patch), strength) for patch, strength in self.patches))


@dataclass(frozen=True)
class LabeledImage:
    """An image ``(3, H, W)`` uint8 and the labels that the classifier assigns to it."""

    picture: Tensor
    labels: Labels


@torch.no_grad()
def _seconds(model: LatentDiffusion, precision: str, batch: int, rounds: int, warm: int = 1) -> float:
    """Shortest time in seconds of ``rounds`` guided steps with ``batch`` images, after ``warm`` warm-up steps."""
    states = encode_prompts(model.text, [""]).index([0] * 2 * batch)
    noise = torch.randn(2 * batch, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    steps = torch.full((2 * batch,), model.train_steps // 2)
    times = []
    for _ in range(warm + rounds):
        began = time.perf_counter()
        with _autocast(model, precision):
            # reading a value synchronizes with an asynchronous device
            float(model.predict_noise(noise, steps, states).sum())
        times.append(time.perf_counter() - began)
    return min(times[warm:])


def faster_precision(model: LatentDiffusion, batch: int = 32, rounds: int = 2) -> str:
    """Return ``"bfloat16"`` if a guided step of ``batch`` images is clearly faster under autocast, else ``"float32"``.

    A model whose weights are not fp32 always gets ``"float32"``, which means no autocast.
    """
    if model.dtype != torch.float32:
        return "float32"
    single, half = (_seconds(model, precision, batch, rounds) for precision in ("float32", "bfloat16"))
    return "bfloat16" if single > MIN_SPEEDUP * half else "float32"


def faster_threads(model: LatentDiffusion, precision: str, batch: int = 32, rounds: int = 2) -> int:
    """Return 1 or the current number of torch threads, whichever samples ``batch`` images faster.

    On a GPU the current number is returned without timing.
    """
    current = torch.get_num_threads()
    if model.device.type != "cpu" or current == 1:
        return current
    # the timing of the precision has usually warmed up the model already
    multi_threaded = _seconds(model, precision, batch, rounds, 0)
    with torch_threads(1):
        single_threaded = _seconds(model, precision, batch, rounds, 0)
    return 1 if single_threaded < multi_threaded else current


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Set the number of torch threads inside a ``with`` block; ``None`` keeps the current number."""
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
    """Apply all patches to the model inside a ``with`` block."""
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
    start: Start | None = None,
    noise: ExtraNoise | None = None,
) -> Iterator[Tensor]:
    """Sample images batch by batch.

    The patches are applied only while a batch is sampled, so the model is unchanged between batches.

    Args:
        model: The model to sample from.
        pictures: Prompts and seeds.
        variant: Patches, negative prompt and safety guidance, or another model. Default: the unedited model.
        sampling: Sampling settings. Default: :class:`SamplingSettings`.
        progress: Receives the sampling steps of each batch, counted from 0.
        start: Latents to start from, one a picture (default: noise).
        noise: Noise that the sampler ``"ddim"`` adds.

    Yields:
        Images ``(n, 3, H, W)``, uint8, on the CPU.
    """
    variant, sampling = variant or Variant(), (sampling or SamplingSettings()).resolved(model)
    model = variant.model or model
    for at in range(0, len(pictures), sampling.batch):
        chunk = pictures[at : at + sampling.batch]
        own = None if start is None else start.rows(at, at + len(chunk))
        latents = draw_latents(model, chunk, variant, sampling, progress, own, noise)
        with torch_threads(sampling.threads):
            images = to_bytes(model.decode(latents, batch=sampling.batch))
        yield images


@torch.no_grad()
def draw_latents(
    model: LatentDiffusion,
    pictures: Sequence[Picture],
    variant: Variant,
    sampling: SamplingSettings,
    progress: Progress | None = None,
    start: Start | None = None,
    noise: ExtraNoise | None = None,
    until: int | None = None,
) -> Tensor:
    """Sample latents ``(n, 4, h, w)``, those of finished images or those after ``until`` steps; as :func:`draw`."""
    sampling = sampling.resolved(model)
    with torch_threads(sampling.threads), patched(model, variant.patches), _autocast(model, sampling.precision):
        return model.sample(
            [picture.prompt for picture in pictures],
            [picture.seed for picture in pictures],
            steps=sampling.steps,
            guidance=sampling.guidance,
            negative=variant.negative,
            until=until,
            batch=sampling.batch,
            progress=progress,
            sampler=sampling.sampler,
            safety=variant.safe,
            start=start,
            noise=noise,
        )


class SampleCache:
    """Cache of sampled and classified images, shared by several measurements.

    :meth:`request` registers images, :meth:`generate` samples those that are missing, and :meth:`get` returns them. The
    images of the unedited model are therefore sampled once for all concepts. With several ``processes`` each samples
    its share, and all of them hold every image afterwards.
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
        """Register images of a variant; images that are cached or already registered are not sampled again."""
        self._variants.setdefault(variant.key, variant)
        wanted = self._pending.setdefault(variant.key, {})
        wanted.update((picture, None) for picture in pictures if (variant.key, picture) not in self._images)

    def generate(self, progress: Progress | None = None) -> None:
        """Sample and classify all registered images. Progress counts sampling steps times images over all of them."""
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
            report_progress(progress, ProgressEvent(at, total * sampling.steps, message=f"sampling {total} images"))

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
        """Discard a variant's images, which take much memory for large models."""
        self._pending.pop(variant.key, None)
        self._variants.pop(variant.key, None)
        self._images = {at: seen for at, seen in self._images.items() if at[0] != variant.key}

    def get(self, variant: Variant, pictures: Sequence[Picture]) -> list[LabeledImage]:
        """Return the cached images of a variant, in the order of ``pictures``."""
        return [self._images[variant.key, picture] for picture in pictures]
