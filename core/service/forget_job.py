"""The job that fits a patch on the loaded model: pictures before, the patch, pictures after, and the patch's file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ForgetConceptError, RequestError, listed
from ..files.workspace import Workspace
from ..files.writing import make_folder
from ..methods.base import Inputs
from ..methods.fit import fit
from ..models.latent_diffusion import LatentDiffusion
from ..patch.patch import Patch
from ..progress import Progress, ProgressEvent, report_progress
from ..request.concept import templates
from ..request.plan import Plan
from ..request.request import MAX_STRENGTH, ForgetRequest, strength_warning
from .host_interface import Host
from .jobs import Outcome, Pair
from .patch_library import PatchLibrary
from .preview import row
from .summaries import fit_summary, surviving_share_summary

if TYPE_CHECKING:
    from ..evaluation.drawing import Picture, SamplingSettings, Variant

__all__ = ["ForgetJob", "check_strength", "comparison_pictures", "drawn", "sampling_of"]

MOST_PAIRS, MOST_STRENGTH = 16, MAX_STRENGTH
# pictures in a batch, of small latents and of any other; an interruption takes effect between two batches
_SMALL, _AT_ONCE, _FEW = 32, 4, 2


@dataclass(frozen=True)
class ForgetJob:
    """A request to fit a patch on the loaded model, save it and, if wanted, apply it.

    Attributes:
        plan: The validated request.
        name: Of the new patch, see :meth:`PatchLibrary.place`.
        folder: Where a name without folders goes, within the LoRA folder.
        precision: One of :data:`PRECISIONS`.
        apply: The strength to apply the patch with as soon as it is saved; ``None``: not at all.
        pairs: Number of prompts to draw before and after.
        steps: Sampling steps of these pictures.
    """

    plan: Plan
    name: str = ""
    folder: str = ""
    precision: str = "float32"
    apply: float | None = None
    pairs: int = 4
    steps: int = 20

    @property
    def request(self) -> ForgetRequest:
        return self.plan.request

    @property
    def title(self) -> str:
        names = [f"'{concept.name}'" for concept in self.request.concepts[:3]]
        more = len(self.request.concepts) - 3
        return "forgetting " + ", ".join(names) + (f" and {more} more" if more > 0 else "")

    def check(self, host: Host, library: PatchLibrary) -> None:
        """Raise :class:`ForgetConceptError` for what can be refused before the job starts."""
        if not 0 <= self.pairs <= MOST_PAIRS:
            raise RequestError(f"The number of picture pairs must be 0 to {MOST_PAIRS}, not {self.pairs}.")
        if self.apply is not None:
            check_strength(self.apply)
        library.place(self.name, self.folder, [concept.name for concept in self.request.concepts])
        host.model()

    def work(self, host: Host, progress: Progress) -> ForgetResult:
        """Draw, fit the patch, and draw again with it; the host's model is restored afterwards."""
        from ..evaluation.drawing import Variant

        started = time.monotonic()
        with host.latent_diffusion() as model:
            pictures = comparison_pictures(self.request, self.pairs if model.vae is not None else 0)
            sampling = sampling_of(model, self.steps)
            before = drawn(model, pictures, Variant(), sampling, progress, "before")
            start = time.monotonic()
            inputs = Inputs(workspace=Workspace(make_folder(host.data_folder()) / "work"))
            patch = fit(model, self.plan, progress, inputs)
            seconds = time.monotonic() - start
            notes = surviving_share_summary(
                (patch.surviving_share(model.survey), str(model.dtype).removeprefix("torch."))
            )
            if self.pairs and model.vae is None:
                notes.append("no pictures were drawn: the model has no VAE here")
            after = drawn(model, pictures, Variant(((patch, 1.0),)), sampling, progress, "after")
            patch = patch.to(device="cpu")
        pairs = tuple(
            Pair(picture.prompt, picture.seed, old, new)
            for picture, old, new in zip(pictures, before, after, strict=True)
        )
        return ForgetResult(patch, pairs, tuple(notes), seconds, time.monotonic() - started)

    def finish(self, host: Host, library: PatchLibrary, result: ForgetResult) -> Outcome:
        """Save the patch, make the host list it, and apply it where wanted."""
        picture = None
        if result.pairs:
            first = result.pairs[0]
            picture = row(torch.stack([first.before, first.after]).movedim(1, -1).float() / 255)
        entry = library.save(result.patch, self.name, self.folder, self.precision, picture)
        host.refresh_patches()
        lines = [f"saved: {entry.place}, in a prompt {entry.tag}"]
        applied = False
        if self.apply is not None:
            try:
                host.apply(entry.name, result.patch, self.apply)
                applied = True
                others = [f"'{one.name}'" for one in host.active() if one.name != entry.name]
                beside = f", beside {listed(others)}" if others else ""
                lines.append(f"applied to the loaded model at strength {self.apply:g}{beside}")
                if (warning := strength_warning(self.apply)) is not None:
                    lines.append(f"warning: {warning}")
            except ForgetConceptError as error:
                lines.append(f"it could not be applied to the loaded model: {error}")
        title = self.plan.method.title
        summary = fit_summary(self.request, result.patch, result.fit_seconds, title, result.notes)
        data: dict[str, Any] = entry.as_dict() | {
            "request": json.loads(self.request.without_images().to_json()),
            "layers": len(result.patch),
            "rank": result.patch.rank,
            "fit_seconds": result.fit_seconds,
            "all_seconds": result.all_seconds,
            "applied": applied,
        }
        return Outcome("\n".join([*lines, summary]), data, result.pairs)


@dataclass(frozen=True)
class ForgetResult:
    """A fitted patch before it is saved; times in seconds."""

    patch: Patch
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]
    fit_seconds: float
    all_seconds: float


def check_strength(strength: float) -> None:
    """Raise :class:`RequestError` unless a patch can be applied with this strength: from -10 to 10, other than 0."""
    if not -MOST_STRENGTH <= strength <= MOST_STRENGTH or strength == 0:
        raise RequestError(f"The strength must be a number from -10 to 10 other than 0, not {strength:g}.")


def comparison_pictures(request: ForgetRequest, count: int) -> list[Picture]:
    """``count`` pictures to draw without and with a patch: of the concepts first, then of the retain set."""
    from ..evaluation.drawing import Picture

    kept = count // 2 if request.preserve else 0
    forget = [templates(concept.kind)[0].format(concept.name) for concept in request.concepts]
    keep = [templates("object")[0].format(phrase) for phrase in request.preserve]
    prompts = [*islice(cycle(forget), count - kept), *islice(cycle(keep), kept)]
    seeds: dict[str, int] = {}
    pictures = []
    for prompt in prompts:
        seeds[prompt] = seeds.get(prompt, -1) + 1
        # torch's generators take no more than 63 bits of a sum
        pictures.append(Picture(prompt, (request.seed + seeds[prompt]) % 2**63))
    return pictures


def sampling_of(model: LatentDiffusion, steps: int) -> SamplingSettings:
    """Sampling settings for pictures in a host: few at a time, so that an interruption takes effect soon."""
    from ..evaluation.drawing import SamplingSettings

    small = max(model.latent_shape[1:]) <= _SMALL
    return SamplingSettings(steps, model.guidance, _AT_ONCE if small else _FEW, "float32")


def drawn(
    model: LatentDiffusion,
    pictures: Sequence[Picture],
    variant: Variant,
    sampling: SamplingSettings,
    progress: Progress | None,
    stage: str,
) -> list[torch.Tensor]:
    """The pictures, uint8 ``(3, H, W)`` each; ``stage`` (before or after) is named in the progress messages."""
    from ..evaluation.drawing import draw

    total, done = len(pictures) * sampling.steps, 0

    def inner(event: ProgressEvent) -> None:
        at = done * sampling.steps + event.step * min(sampling.batch, len(pictures) - done)
        report_progress(progress, ProgressEvent(at, total, message=f"drawing {len(pictures)} pictures {stage}"))

    found: list[torch.Tensor] = []
    for images in draw(model, pictures, variant, sampling, inner):
        found += list(images)
        done = len(found)
    return found
