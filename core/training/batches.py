"""Training batches: prompts, their text states, latents, time steps and noise.

All random numbers come from one generator, so training depends on its seed alone and an interrupted training can be
resumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RequestError
from ..files.workspace import Workspace, key_of
from ..models.autoencoders import encode_images
from ..models.latent_diffusion import LatentDiffusion
from ..models.text_encoders import EncodedPrompts, TextEncoder
from ..models.text_states import TextStates
from ..models.token_positions import end_position, token_positions
from ..progress import Progress
from ..request.concept import Concept

__all__ = ["RETAIN_POOL", "BatchSampler", "GenerationSettings", "Noised", "TargetPrompt", "target_prompt"]

# name of the pool of latents of the retain set
RETAIN_POOL = ""


@dataclass(frozen=True)
class TargetPrompt:
    """A prompt to forget.

    Args:
        concept: Name of the concept.
        text: The prompt, which contains the name.
        positions: Token positions of the concept in the prompt.
        replacement_text: The same prompt with the replacement; ``None``: the concept has none.
    """

    concept: str
    text: str
    positions: tuple[int, ...]
    replacement_text: str | None = None


@dataclass(frozen=True)
class GenerationSettings:
    """How the unedited model generates training images.

    Args:
        steps: Sampling steps.
        guidance: Classifier-free guidance scale.
    """

    steps: int
    guidance: float


class Noised(NamedTuple):
    """A batch of noised latents: ``x_t``, ``ε`` and ``x_0``, each ``(n, 4, h, w)``, and time steps ``t``, ``(n,)``."""

    x: Tensor
    times: Tensor
    noise: Tensor
    x0: Tensor


def target_prompt(
    encoder: TextEncoder, concept: Concept, text: str, replacement_text: str | None, include_end: bool = False
) -> TargetPrompt:
    """Locate a concept in a prompt.

    Args:
        encoder: The model's text encoder.
        concept: The concept to forget.
        text: A prompt that contains its name.
        replacement_text: The same prompt with the replacement.
        include_end: Add the position of the first end-of-text token.

    Returns:
        The prompt with the positions of all sub-words of the concept.

    Raises:
        TokenError: The concept does not occur in ``text``, or one of the prompts is cut off.
    """
    positions = token_positions(encoder, concept.name, text)
    end = end_position(encoder, text)
    if replacement_text is not None:
        end_position(encoder, replacement_text)
    return TargetPrompt(concept.name, text, tuple([*positions, end] if include_end else positions), replacement_text)


class BatchSampler:
    """Draws training batches from prompts and from pools of latents.

    A pool is named after its concept; :data:`RETAIN_POOL` is that of the retain set. Without any pool ``x_0`` is zero.
    Every prompt is encoded at construction, so no fixed prompt is encoded during training.

    Args:
        model: The base model.
        targets: Prompts to forget.
        retain: Prompts to preserve, the empty one first.
        generator: Source of all random numbers, on the CPU.
        batch_size: Prompts per batch.
        sampling: How the model generates images.
        workspace: Folder where generated latents are cached.
        earlier: Prompts of concepts that earlier requests of a sequence forgot.
        others: Further prompts that the objective reads.
        progress: Called with the number of encoded prompts; may raise :class:`Cancelled`.

    Raises:
        RequestError: A prompt is both to be forgotten and to be preserved, or there is no prompt.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        targets: Sequence[TargetPrompt],
        retain: Sequence[str],
        generator: torch.Generator,
        batch_size: int,
        sampling: GenerationSettings,
        workspace: Workspace | None = None,
        earlier: Sequence[str] = (),
        others: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        if clash := sorted({t.text for t in targets} & set(retain)):
            raise RequestError(
                f"The prompt '{clash[0]}' is both to be forgotten and to be preserved: remove it from one of the two."
            )
        self.model, self.targets, self.retain, self.earlier = model, list(targets), list(retain), list(earlier)
        self.generator, self.batch_size = generator, batch_size
        self.sampling, self.workspace = sampling, workspace
        self.pools: dict[str, Tensor] = {}
        self._target_queue: list[int] = []
        self._retain_queue: list[int] = []
        replacements = [t.replacement_text for t in targets if t.replacement_text is not None]
        prompts = [*(t.text for t in targets), *replacements, *self.retain, *self.earlier, *others]
        if not prompts:
            raise RequestError("There is no prompt to train on: give at least one prompt to forget or to preserve.")
        self._encoded = EncodedPrompts(model.text, prompts, model.device, progress)

    # -- prompts -------------------------------------------------------------------------------------------------

    def states(self, texts: Sequence[str]) -> TextStates:
        """The text states of some prompts, in their order.

        Raises:
            ForgetConceptError: A prompt was not given at construction.
        """
        return self._encoded.states(texts)

    def next_targets(self, count: int | None = None) -> list[TargetPrompt]:
        """The next prompts to forget; each is drawn once per shuffled round."""
        return [self.targets[i] for i in self._take(self._target_queue, len(self.targets), count or self.batch_size)]

    def next_retain(self, count: int | None = None) -> list[str]:
        """The next prompts to preserve: the empty one in every batch, the others in shuffled rounds."""
        count = count or self.batch_size
        if not self.retain:
            raise RequestError("There is no prompt to preserve: set 'preserve_weight' to 0, or give some.")
        if len(self.retain) == 1 or count == 1:
            return [self.retain[i] for i in self._take(self._retain_queue, len(self.retain), count)]
        others = self._take(self._retain_queue, len(self.retain) - 1, count - 1)
        return [self.retain[0], *(self.retain[1 + i] for i in others)]

    def next_earlier(self, count: int) -> list[str]:
        """Prompts of concepts that earlier requests forgot, drawn at random."""
        drawn = torch.randint(len(self.earlier), (count,), generator=self.generator).tolist()
        return [self.earlier[i] for i in drawn]

    def _take(self, queue: list[int], size: int, count: int) -> list[int]:
        """Take ``count`` indices off a queue, refilled with shuffled rounds of ``range(size)``."""
        while len(queue) < count:
            queue += torch.randperm(size, generator=self.generator).tolist()
        taken, queue[:] = queue[:count], queue[count:]
        return taken

    # -- images --------------------------------------------------------------------------------------------------

    def draw(self, prompts: Mapping[str, Sequence[str]], count: int, progress: Progress | None = None) -> None:
        """Fill pools with latents that the unedited model generates; the workspace caches them.

        Args:
            prompts: The prompts of each pool, which are used in turn.
            count: Latents per pool.
            progress: Called with every sampling step; may raise :class:`Cancelled`.
        """
        jobs = [(name, texts[i % len(texts)]) for name, texts in prompts.items() for i in range(count)]
        if not jobs:
            return
        seeds = torch.randint(2**62, (len(jobs),), generator=self.generator).tolist()
        texts, s = [text for _, text in jobs], self.sampling
        key, latents = "", None
        if self.workspace is not None:
            encoding = [self.model.text_layer, list(self.model.latent_shape)]
            key = key_of(self.model.model_hash, texts, seeds, s.steps, s.guidance, encoding)
            shapes = {"latents": (len(jobs), *self.model.latent_shape)}
            latents = (self.workspace.load("pictures", key, shapes) or {}).get("latents")
        if latents is None:
            latents = self.model.sample(texts, seeds, s.steps, s.guidance, progress=progress, sampler="dpm++").float()
            if self.workspace is not None:
                self.workspace.save("pictures", key, {"latents": latents})
        latents = latents.to(self.model.device)
        for name in prompts:
            self.pools[name] = latents[[i for i, (other, _) in enumerate(jobs) if other == name]]

    def encode(self, name: str, images: Tensor, progress: Progress | None = None) -> None:
        """Fill a pool with the user's reference images.

        Args:
            name: Name of the pool.
            images: ``(n, 3, H, W)`` in [-1, 1].
            progress: Called with the number of encoded images; may raise :class:`Cancelled`.

        Raises:
            RequestError: The model was loaded without an autoencoder, or the images have another size than it works on.
        """
        if self.model.vae is None:
            raise RequestError(
                f"Images of '{name}' were given, but there is no autoencoder to encode them with: load the model with "
                "its VAE, or leave the images out."
            )
        latents = encode_images(self.model.vae, images, progress)
        if tuple(latents.shape[1:]) != self.model.latent_shape:
            height, width = (8 * side for side in self.model.latent_shape[1:])
            raise RequestError(
                f"The images of '{name}' are {images.shape[3]}×{images.shape[2]}; this model works on "
                f"{width}×{height}: resize them."
            )
        self.pools[name] = latents.to(self.model.device)

    def noised(self, names: Sequence[str]) -> Noised:
        """One row per name: a random latent of that pool, noised to a random time step."""
        shape = (len(names), *self.model.latent_shape)
        if self.pools:
            rows = []
            for name in names:
                pool = self.pools[name]
                rows.append(pool[int(torch.randint(len(pool), (1,), generator=self.generator))])
            x0 = torch.stack(rows)
        else:
            x0 = torch.zeros(shape, device=self.model.device)
        times = torch.randint(self.model.train_steps, (len(names),), generator=self.generator)
        noise = torch.randn(shape, generator=self.generator).to(x0.device)
        return Noised(self.model.add_noise(x0, noise, times), times, noise, x0)

    # -- resuming ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything that the next batches depend on; the names are those in saved checkpoints."""
        return {
            "generator": self.generator.get_state(),
            "turn": torch.tensor(self._target_queue, dtype=torch.long),
            "kept_turn": torch.tensor(self._retain_queue, dtype=torch.long),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a :meth:`state`.

        Raises:
            ValueError: It is that of other batches.
        """
        queues = [state["turn"].tolist(), state["kept_turn"].tolist()]
        for queue, count in zip(queues, (len(self.targets), len(self.retain)), strict=True):
            if any(type(index) is not int or not 0 <= index < count for index in queue):
                raise ValueError("the order of its pictures is of other concepts")
        self.generator.set_state(state["generator"].cpu())
        self._target_queue, self._retain_queue = queues
