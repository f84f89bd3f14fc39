"""Attack context: the patched model, images of the concept, and a budget."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...errors import ForgetConceptError, ModelError
from ...files.workspace import Workspace, key_of
from ...models.images import check_images, from_bytes, picture_size
from ...models.latent_diffusion import LatentDiffusion
from ...models.sampling_start import ExtraNoise, Start
from ...models.text_encoders import CLIPText
from ...patch.patch import Patch
from ...progress import Progress
from ..drawing import Picture, SamplingSettings, Variant, draw, patched
from ..questions import seed_of
from .budget import AttackBudget
from .judge import SuccessJudge
from .target import Target

__all__ = ["AttackContext", "SearchResult", "example_latents", "with_hash_of"]

ROUNDS = 3


def with_hash_of(model: LatentDiffusion, patches: Sequence[tuple[Patch, float]]) -> LatentDiffusion:
    """Return a shallow copy of the model whose hash includes the patches; the patches are not applied.

    Results cached in a workspace for one patch are then not used for another.
    """
    if not patches:
        return model
    own = copy.copy(model)
    own.__dict__.pop("model_hash", None)
    parts = [[strength, {k: [f.up, f.down] for k, f in patch.factors.items()}] for patch, strength in patches]
    own._known_hash = key_of(model.model_hash, parts)
    return own


@dataclass(frozen=True)
class SearchResult:
    """The result of an attack's search.

    Attributes:
        prompts: The prompts found.
        model: The model that encodes them, with learned vectors as placeholder words where there are any.
        gradient_steps: Gradient steps of the search.
        unet_passes: Images that passed forward through the UNet.
        losses: Losses of the accepted candidates from the start on, if the search records them.
        start: What sampling starts from, if not from noise: image ``i`` from row ``i``, modulo their number.
        noises: Noise to add while sampling. An image is drawn once with each, and shows the concept if one of them
            does.
        sampling: Sampling settings, if not those of the context.
    """

    prompts: tuple[str, ...]
    model: LatentDiffusion
    gradient_steps: int = 0
    unet_passes: int = 0
    losses: tuple[float, ...] = ()
    start: Start | None = None
    noises: tuple[ExtraNoise | None, ...] = (None,)
    sampling: SamplingSettings | None = None


@dataclass(frozen=True, eq=False)
class AttackContext:
    """A model under attack.

    Attributes:
        model: The unedited model; :meth:`edited` applies the patches temporarily.
        variant: Patches, negative prompt and safety guidance.
        target: The concept under attack.
        judge: Decides whether an image shows the concept.
        latents: Latents ``(m, 4, h, w)`` of images that show the concept.
        budget: The attack budget.
        sampling: Sampling settings.
        seed: Seed of the attack.
        workspace: Caches results.
        base: The model before it forgot, if it is not ``model`` without the patches.
    """

    model: LatentDiffusion
    variant: Variant
    target: Target
    judge: SuccessJudge
    latents: Tensor
    budget: AttackBudget
    sampling: SamplingSettings
    seed: int
    workspace: Workspace | None = None
    base: LatentDiffusion | None = None

    @contextmanager
    def edited(self) -> Iterator[None]:
        """Apply the patches inside a ``with`` block and enable gradients even if the host is in inference mode."""
        with torch.inference_mode(False), patched(self.model, self.variant.patches):
            yield

    @property
    def clip(self) -> CLIPText:
        """The CLIP text encoder.

        Raises:
            ModelError: If the model has another text encoder, because gradients cannot reach its embeddings.
        """
        if not isinstance(self.model.text, CLIPText):
            raise ModelError(
                "This attack needs gradients through the text encoder, which are supported for the CLIP of SD1 and SD2 "
                f"only, not for {type(self.model.text).__name__}: choose a black-box attack."
            )
        return self.model.text

    @property
    def stride(self) -> float:
        """The learning rate: the budget's ``stride`` in units of the text encoder's embeddings."""
        return self.budget.stride * float(self.clip.model.get_input_embeddings().weight.detach().float().std(0).mean())

    @cached_property
    def text_key(self) -> str:
        """Key of the text encoder, which the model's hash does not cover."""
        text = self.model.text
        return key_of(dict(text.model.state_dict()), text.layer) if isinstance(text, CLIPText) else type(text).__name__


def example_latents(
    model: LatentDiffusion,
    target: Target,
    judge: SuccessJudge,
    count: int,
    sampling: SamplingSettings,
    seed: int = 0,
    workspace: Workspace | None = None,
    progress: Progress | None = None,
    images: Tensor | None = None,
) -> Tensor:
    """Return latents of images of the concept, either given or sampled by the unedited model.

    Sampled images are used only if the judge finds the concept in them.

    Args:
        model: The unedited model.
        target: The concept under attack.
        judge: Decides whether an image shows the concept.
        count: Number of images to sample.
        sampling: Sampling settings.
        seed: Seed of the sampled images.
        workspace: Caches the sampled images.
        progress: Receives sampling progress.
        images: Images ``(m, 3, H, W)`` in [-1, 1] to use instead.

    Returns:
        Latents ``(m, 4, h, w)``, fp32, on the CPU.

    Raises:
        ModelError: If the model has no autoencoder.
        RequestError: If the images have another size.
        ForgetConceptError: If the model does not draw the concept.
    """
    if model.vae is None:
        raise ModelError(
            f"The model '{model.name}' has no autoencoder, so it cannot encode images for the attack: load one."
        )
    if images is None:
        images = _generate_examples(model, target, judge, count, sampling, seed, workspace, progress)
    else:
        height, width = (8 * side for side in model.latent_shape[1:])
        check_images(images, 1, (height, width), f"'{target.concept.name}'")
    latents = torch.cat([model.vae.encode(images[i : i + 16]) for i in range(0, len(images), 16)])
    return latents.detach().float().cpu()


def _generate_examples(
    model: LatentDiffusion,
    target: Target,
    judge: SuccessJudge,
    count: int,
    sampling: SamplingSettings,
    seed: int,
    workspace: Workspace | None,
    progress: Progress | None,
) -> Tensor:
    s, prompts = sampling, target.prompts
    conditions = [s.steps, s.guidance, s.precision, s.sampler, model.device.type]
    key = key_of("examples", model.model_hash, judge.description, list(prompts), count, seed, conditions)
    shapes = {"images": (None, 3, *picture_size(model))}
    if workspace is not None and (known := workspace.load("attack", key, shapes)) is not None:
        return from_bytes(known["images"])
    found: list[Tensor] = []
    for turn in range(ROUNDS):
        pictures = [
            Picture(prompts[i % len(prompts)], seed_of("attack", "example", seed, i))
            for i in range(turn * count, (turn + 1) * count)
        ]
        for images in draw(model, pictures, Variant(), sampling, progress):
            verdicts = judge.shows(from_bytes(images))
            found += [image for image, shown in zip(images, verdicts, strict=True) if shown]
        if len(found) >= count:
            break
    if not found:
        raise ForgetConceptError(
            f"The unedited model draws no '{target.concept.name}' in {ROUNDS * count} images of '{prompts[0]}' and "
            "similar prompts, so its recovery cannot be measured: give images of it, or other prompts."
        )
    chosen = torch.stack(found[:count])
    if workspace is not None:
        workspace.save("attack", key, {"images": chosen})
    return from_bytes(chosen)
