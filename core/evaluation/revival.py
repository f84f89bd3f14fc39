"""How many steps of fine-tuning bring a forgotten concept back.

Fine-tuning on images of the concept measures how deep it is forgotten; fine-tuning on other images measures whether a
patch holds when people train the model further.

References: Suriyakumar et al. 2024, arXiv 2410.08074; arXiv 2505.16174; ResAlign, arXiv 2507.16302.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import RequestError
from ..models.images import from_bytes
from ..models.latent_diffusion import LatentDiffusion
from ..patch.patch import Patch
from ..progress import Progress
from ..training.fine_tuning import FineTuningSettings, fine_tune
from .attacks.judge import SuccessJudge
from .drawing import Picture, SamplingSettings, Variant, draw
from .intervals import Score
from .questions import seed_of

__all__ = ["REVIVED", "STEPS", "Revival", "revival"]

# share of images from which a concept counts as brought back
REVIVED = 0.5
STEPS = (10, 20, 40, 80, 160)


@dataclass(frozen=True)
class Revival:
    """Share of images that show the concept after each number of training steps.

    Attributes:
        concept: The concept.
        steps: Numbers of steps, ascending, 0 first.
        shown: The share after each.
    """

    concept: str
    steps: tuple[int, ...]
    shown: tuple[Score, ...]

    @property
    def needed(self) -> int | None:
        """The first number of steps after which half of the images show the concept; ``None`` if there is none."""
        return next((n for n, one in zip(self.steps, self.shown, strict=True) if one.value >= REVIVED), None)


def revival(
    model: LatentDiffusion,
    patches: Sequence[tuple[Patch, float]],
    concept: str,
    asked: Sequence[str],
    judge: SuccessJudge,
    latents: Tensor,
    prompts: Sequence[str],
    steps: Sequence[int] = STEPS,
    pictures: int = 24,
    settings: FineTuningSettings | None = None,
    sampling: SamplingSettings | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Revival:
    """Fine-tune a patched model with a LoRA, and draw images of the concept on the way.

    Args:
        model: The unedited model.
        patches: The patches with their strengths, applied while training and drawing.
        concept: The concept.
        asked: Prompts that name it.
        judge: Decides whether an image shows it.
        latents: Latents of the images to train on, ``(m, 4, h, w)``.
        prompts: One prompt for each of these.
        steps: Numbers of steps after which images are drawn.
        pictures: Images each time.
        settings: How the LoRA is trained.
        sampling: Sampling settings.
        seed: Seed of the training and the images.
        progress: Receives progress of training and of drawing, in turn.

    Raises:
        RequestError: If there is no prompt that names the concept, or as :func:`fine_tune`.
        PatchError: If a patch does not fit the model.
        Cancelled: If ``progress`` cancels.
    """
    if not asked:
        raise RequestError(f"There is no prompt that names '{concept}': give at least one.")
    sampling = (sampling or SamplingSettings()).resolved(model)
    earlier = Patch.combined(list(patches)) if patches else None
    tuned = fine_tune(model, latents, prompts, steps, settings, seed, earlier, progress)
    wanted = [Picture(asked[i % len(asked)], seed_of("revival", concept, seed, i)) for i in range(pictures)]

    def shown(variant: Variant) -> Score:
        found: list[bool] = []
        for images in draw(model, wanted, variant, sampling, progress):
            found += map(bool, judge.shows(from_bytes(images)))
        return Score.share(found)

    shares = [shown(Variant(tuple(patches)))]
    shares += [shown(Variant((*patches, (patch, 1.0)))) for patch in tuned.values()]
    return Revival(concept, (0, *tuned), tuple(shares))
