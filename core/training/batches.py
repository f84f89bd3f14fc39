"""What a trained method draws its batches from: a request's prompts, their text states, pictures, times and noise.

Everything that is drawn comes from one generator, so that a training depends on its seed alone and can go on where it
was cut short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RequestError
from ..files.workspace import Workspace, key_of
from ..models.latent_diffusion import LatentDiffusion
from ..models.text_encoders import EncodedPrompts, TextEncoder, TextStates
from ..models.token_positions import end_position, token_positions
from ..progress import Progress
from ..request.concept import Concept

__all__ = ["RETAIN_POOL", "BatchSampler", "GenerationSettings", "Noised", "TargetPrompt", "target_prompt"]

# the pool of pictures that belong to no concept to be forgotten
RETAIN_POOL = ""


@dataclass(frozen=True)
class TargetPrompt:
    """One way to say a concept: its name, the whole prompt, its token positions, the same with the replacement."""

    concept: str
    text: str
    positions: tuple[int, ...]
    instead: str | None = None


@dataclass(frozen=True)
class GenerationSettings:
    """How a method's own pictures are made by the model as it is."""

    steps: int
    guidance: float


class Noised(NamedTuple):
    """A batch: ``x_t``, ``ε`` and ``x_0``, each ``(n, 4, h, w)``, and ``t``, ``(n,)``."""

    x: Tensor
    times: Tensor
    noise: Tensor
    x0: Tensor


def target_prompt(
    encoder: TextEncoder, concept: Concept, text: str, instead: str | None, include_end: bool = False
) -> TargetPrompt:
    """A prompt that says the concept, looked through: every sub-word's position and, if wanted, the first end-of-text.

    Raises :class:`TokenError` where the concept is not in it or either prompt is cut off.
    """
    positions = token_positions(encoder, concept.name, text)
    end = end_position(encoder, text)
    if instead is not None:
        end_position(encoder, instead)
    return TargetPrompt(concept.name, text, tuple([*positions, end] if include_end else positions), instead)


class BatchSampler:
    """Prompts to forget (``targets``), to keep (``kept``, the empty one first) and of what is forgotten already
    (``earlier``), and pools of pictures by name.

    A pool is named after its concept, :data:`RETAIN_POOL` is that of everything else; without one, ``x_0`` is zero.
    Every prompt is encoded at construction, those in ``others`` too: nothing is left to encode once training has begun.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        targets: Sequence[TargetPrompt],
        kept: Sequence[str],
        generator: torch.Generator,
        batch_size: int,
        sampling: GenerationSettings,
        workspace: Workspace | None = None,
        earlier: Sequence[str] = (),
        others: Sequence[str] = (),
    ) -> None:
        """``others`` are further prompts that an objective reads. Raises :class:`RequestError` for a prompt that is to
        be forgotten and kept, and where there is none at all."""
        if clash := sorted({t.text for t in targets} & set(kept)):
            raise RequestError(f"The prompt '{clash[0]}' is both to be forgotten and to be kept: take it from one.")
        self.model, self.targets, self.kept, self.earlier = model, list(targets), list(kept), list(earlier)
        self.generator, self.batch_size = generator, batch_size
        self.sampling, self.workspace = sampling, workspace
        self.pools: dict[str, Tensor] = {}
        self._turn: list[int] = []
        self._kept_turn: list[int] = []
        replaced = [t.instead for t in targets if t.instead is not None]
        every = [*(t.text for t in targets), *replaced, *self.kept, *self.earlier, *others]
        if not every:
            raise RequestError("There is no prompt to train on.")
        self._encoded = EncodedPrompts(model.text, every, model.device)

    # -- words ---------------------------------------------------------------------------------------------------

    def states(self, texts: Sequence[str]) -> TextStates:
        """What the UNet is given of these prompts, in their order.

        Raises :class:`ForgetConceptError` for a prompt that was not named at construction.
        """
        return self._encoded.states(texts)

    def next_targets(self, count: int | None = None) -> list[TargetPrompt]:
        """The next prompts to forget, in shuffled rounds, so that no concept waits long for its turn."""
        return [self.targets[i] for i in self._next(self._turn, len(self.targets), count or self.batch_size)]

    def next_retain(self, count: int | None = None) -> list[str]:
        """The next prompts to keep: the empty one in every batch, the others in shuffled rounds."""
        count = count or self.batch_size
        if not self.kept:
            raise RequestError("There is no prompt to keep.")
        if len(self.kept) == 1 or count == 1:
            return [self.kept[i] for i in self._next(self._kept_turn, len(self.kept), count)]
        others = self._next(self._kept_turn, len(self.kept) - 1, count - 1)
        return [self.kept[0], *(self.kept[1 + i] for i in others)]

    def next_earlier(self, count: int) -> list[str]:
        """Prompts of what earlier requests forgot, drawn at random."""
        drawn = torch.randint(len(self.earlier), (count,), generator=self.generator).tolist()
        return [self.earlier[i] for i in drawn]

    def _next(self, turn: list[int], of: int, count: int) -> list[int]:
        while len(turn) < count:
            turn += torch.randperm(of, generator=self.generator).tolist()
        taken, turn[:] = turn[:count], turn[count:]
        return taken

    # -- pictures ------------------------------------------------------------------------------------------------

    def draw(self, wanted: Mapping[str, Sequence[str]], count: int, progress: Progress | None = None) -> None:
        """Fill pools with ``count`` pictures each, of their prompts in turn, by the model as it is (nothing put on).

        Kept in the workspace, where there is one, and taken from there the next time.
        """
        jobs = [(name, texts[i % len(texts)]) for name, texts in wanted.items() for i in range(count)]
        if not jobs:
            return
        seeds = torch.randint(2**62, (len(jobs),), generator=self.generator).tolist()
        texts, s = [text for _, text in jobs], self.sampling
        key, latents = "", None
        if self.workspace is not None:
            read = [self.model.text_layer, list(self.model.latent_shape)]
            key = key_of(self.model.model_hash, texts, seeds, s.steps, s.guidance, read)
            latents = (self.workspace.load("pictures", key) or {}).get("latents")
        if latents is None:
            latents = self.model.sample(texts, seeds, s.steps, s.guidance, progress=progress, sampler="dpm++").float()
            if self.workspace is not None:
                self.workspace.save("pictures", key, {"latents": latents})
        latents = latents.to(self.model.device)
        for name in wanted:
            self.pools[name] = latents[[i for i, (other, _) in enumerate(jobs) if other == name]]

    def encode(self, name: str, images: Tensor) -> None:
        """Fill a pool with a person's own pictures, ``(n, 3, H, W)`` in [-1, 1].

        Raises :class:`RequestError` where the model has no autoencoder here or they are not of its size.
        """
        if self.model.vae is None:
            raise RequestError("Pictures were given, and this model has no autoencoder here to read them with.")
        latents = torch.cat([self.model.vae.encode(images[i : i + 16]) for i in range(0, len(images), 16)])
        if tuple(latents.shape[1:]) != self.model.latent_shape:
            height, width = (8 * side for side in self.model.latent_shape[1:])
            raise RequestError(
                f"The pictures given for '{name}' are {images.shape[3]}×{images.shape[2]}; this model works on "
                f"{width}×{height}."
            )
        self.pools[name] = latents.float().to(self.model.device)

    def noised(self, names: Sequence[str]) -> Noised:
        """One row a name: a picture of that pool at a random time step under random noise."""
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

    # -- going on where it was cut short -------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        return {
            "generator": self.generator.get_state(),
            "turn": torch.tensor(self._turn, dtype=torch.long),
            "kept_turn": torch.tensor(self._kept_turn, dtype=torch.long),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.generator.set_state(state["generator"].cpu())
        self._turn = state["turn"].tolist()
        self._kept_turn = state["kept_turn"].tolist()
