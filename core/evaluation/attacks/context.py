"""What every attack is given: the model with the patches that are on it, pictures of the concept, and a budget."""

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
from ...models.images import check_images, from_bytes
from ...models.latent_diffusion import LatentDiffusion
from ...models.text_encoders import CLIPText
from ...patch.patch import Patch
from ...progress import Progress
from ..drawing import Picture, SamplingSettings, Variant, draw, patched
from ..scores import seed_of
from .budget import AttackBudget
from .judge import SuccessJudge
from .target import Target

__all__ = ["AttackContext", "SearchResult", "example_latents", "with_hash_of"]

ROUNDS = 3


def with_hash_of(model: LatentDiffusion, patches: Sequence[tuple[Patch, float]]) -> LatentDiffusion:
    """The same model, its modules shared, under the hash of the model with these patches on.

    What is kept in a work folder for one patch is then never taken for that of another. Nothing is put on.
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
    """What an attack's search yields: prompts, and the model that can read them (learned vectors may be among its
    words). ``losses`` are what the search held itself to, from its start on, where it kept count."""

    prompts: tuple[str, ...]
    model: LatentDiffusion
    gradient_steps: int = 0
    unet_passes: int = 0
    losses: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class AttackContext:
    """One model under attack: ``model`` itself is unchanged, :meth:`edited` puts ``variant``'s patches on for a while.

    ``latents`` ``(m, 4, h, w)`` are of pictures that show the concept.
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

    @contextmanager
    def edited(self) -> Iterator[None]:
        """The patches are on inside a ``with`` block, in which gradients can be taken whatever mode a host is in."""
        with torch.inference_mode(False), patched(self.model, self.variant.patches):
            yield

    @property
    def clip(self) -> CLIPText:
        """The text encoder, where gradients reach its words. Raises :class:`ModelError` for another one."""
        if not isinstance(self.model.text, CLIPText):
            raise ModelError(
                "This attack needs gradients through the text encoder, which only SD1's and SD2's CLIP gives here, not "
                f"{type(self.model.text).__name__}."
            )
        return self.model.text

    @property
    def stride(self) -> float:
        """The learning rate of the budget's ``stride`` in this text encoder's own scale."""
        return self.budget.stride * float(self.clip.model.get_input_embeddings().weight.detach().float().std(0).mean())

    @cached_property
    def text_key(self) -> str:
        """Tells text encoders apart, which a model's hash does not."""
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
    """Latents ``(m, 4, h, w)`` of pictures of the concept: ``images`` if given, else ``count`` by the unedited model.

    Of its own pictures only those count in which the judge finds the concept. Raises :class:`ModelError` where the
    model cannot make pictures into latents, :class:`RequestError` for images of another size, and
    :class:`ForgetConceptError` where it hardly draws the concept.
    """
    if model.vae is None:
        raise ModelError(f"The model '{model.name}' has no autoencoder here, so there are no pictures to attack with.")
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
    about = [s.steps, s.guidance, s.precision, s.sampler, model.device.type]
    key = key_of("examples", model.model_hash, judge.description, list(prompts), count, seed, about)
    if workspace is not None and (known := workspace.load("attack", key)) is not None:
        return from_bytes(known["images"])
    found: list[Tensor] = []
    for turn in range(ROUNDS):
        pictures = [
            Picture(prompts[i % len(prompts)], seed_of("attack", "example", seed, i))
            for i in range(turn * count, (turn + 1) * count)
        ]
        for images in draw(model, pictures, Variant(), sampling, progress):
            right = judge.shows(from_bytes(images))
            found += [image for image, shown in zip(images, right, strict=True) if shown]
        if len(found) >= count:
            break
    if not found:
        raise ForgetConceptError(
            f"The unedited model draws no '{target.concept.name}' in {ROUNDS * count} pictures of '{prompts[0]}' and "
            "the like, so whether it comes back cannot be asked: give pictures of it, or other prompts."
        )
    chosen = torch.stack(found[:count])
    if workspace is not None:
        workspace.save("attack", key, {"images": chosen})
    return from_bytes(chosen)
