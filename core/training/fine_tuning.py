"""Plain fine-tuning with a LoRA: the denoising loss on images with prompts.

It is what people do to a model that was made to forget, with images of the concept or of anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RequestError
from ..models.latent_diffusion import LatentDiffusion
from ..models.text_encoders import EncodedPrompts
from ..patch.patch import Patch
from ..progress import Progress, ProgressEvent, report_progress
from .adapters import Deltas
from .loop import Term, Terms, TrainingSettings, train
from .losses import noise_matching

__all__ = ["FineTuningSettings", "fine_tune"]


@dataclass(frozen=True)
class FineTuningSettings:
    """How a LoRA is trained.

    Args:
        rank: Its rank.
        lr: Learning rate of AdamW.
        batch_size: Images per step.

    Raises:
        RequestError: If a value is not above 0.
    """

    rank: int = 8
    lr: float = 1e-3
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.rank < 1 or self.batch_size < 1 or not self.lr > 0:
            raise RequestError("The rank, the learning rate and the batch size of fine-tuning must be above 0.")


def fine_tune(
    model: LatentDiffusion,
    latents: Tensor,
    prompts: Sequence[str],
    steps: Sequence[int],
    settings: FineTuningSettings | None = None,
    seed: int = 0,
    earlier: Patch | None = None,
    progress: Progress | None = None,
) -> dict[int, Patch]:
    """Train a LoRA of every layer that LoRA trainers target, and keep it after several numbers of steps.

    The model is restored bit-exactly.

    Args:
        model: The model.
        latents: Latents of the images, ``(m, 4, h, w)``.
        prompts: One prompt an image.
        steps: Numbers of steps after which the LoRA is kept; training ends after the highest.
        settings: How it is trained. Default: :class:`FineTuningSettings`.
        seed: Seed of the initial factors and of the training.
        earlier: A patch that is applied meanwhile.
        progress: Called with every step; may raise :class:`Cancelled`.

    Returns:
        The LoRA without ``earlier`` by number of steps, ascending.

    Raises:
        RequestError: If there is not one prompt for each of one or more images, or a number of steps is below 1.
        ForgetConceptError: As :func:`train`.

    Reference: Hu et al. 2021, arXiv 2106.09685.
    """
    settings = settings or FineTuningSettings()
    wanted = sorted(set(steps))
    if not len(latents) or len(prompts) != len(latents):
        raise RequestError(f"There are {len(latents)} images and {len(prompts)} prompts: give one prompt for each.")
    if not wanted or wanted[0] < 1:
        raise RequestError("Fine-tuning needs at least one step.")
    generator = torch.Generator("cpu").manual_seed(seed)
    deltas = Deltas(model, list(model.survey.layers), settings.rank, generator, earlier)
    found: dict[int, Patch] = {}

    def keep(event: ProgressEvent) -> None:
        if event.step in wanted and event.step not in found:
            found[event.step] = Patch(deltas.factors(), {}).with_metadata(family=model.survey.family)
        report_progress(progress, event)

    objective = _CaptionedImages(model, latents.detach().float().cpu(), prompts, settings.batch_size, generator)
    train(model, deltas, objective, TrainingSettings(wanted[-1], settings.lr), keep, "fine-tuning")
    return found


class _CaptionedImages:
    """The denoising loss of images under their prompts; an :class:`Objective`."""

    def __init__(
        self, model: LatentDiffusion, latents: Tensor, prompts: Sequence[str], batch: int, generator: torch.Generator
    ) -> None:
        self.model, self.latents, self.prompts, self.batch = model, latents, list(prompts), batch
        self.generator = generator
        self.encoded = EncodedPrompts(model.text, self.prompts)

    def state(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])

    def __call__(self, step: int) -> Terms:
        rows = torch.randint(len(self.latents), (self.batch,), generator=self.generator)
        times = torch.randint(self.model.train_steps, (self.batch,), generator=self.generator)
        x0 = self.latents[rows]
        noise = torch.randn(x0.shape, generator=self.generator)
        x, noise = self.model.add_noise(x0, noise, times).to(self.model.device), noise.to(self.model.device)
        states = self.encoded.states([self.prompts[i] for i in rows.tolist()])
        return {"denoising": Term(noise_matching(self.model.predict_noise(x, times, states), noise))}
