"""Textual inversion: learning token embeddings of a concept from images.

Gal et al., *An Image is Worth One Word* (arXiv 2208.01618), with several vectors per concept, as in Forget-Me-Not
(arXiv 2303.17591, §3.1). The denoising loss on the images is minimized over the vectors alone; the UNet and the text
encoder are frozen. No token is added to the tokenizer and no weight is written: a hook inserts the vectors while a
prompt is encoded.
"""

from __future__ import annotations

import copy
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ForgetConceptError, ModelError, RequestError
from ..files.workspace import Workspace, key_of
from ..models.latent_diffusion import LatentDiffusion
from ..models.text_encoders import CLIPText
from ..models.text_states import TextStates
from ..models.token_positions import end_position
from ..progress import Progress
from ..request.concept import normalized_phrase
from .frozen import frozen
from .loop import Checkpoint, Term, Terms, TrainingSettings, train
from .losses import noise_matching

__all__ = ["PLACEHOLDER", "InversionSettings", "InvertedText", "invert", "with_vectors"]

PLACEHOLDER = "<concept>"


class InvertedText:
    """A :class:`TextEncoder` that uses given vectors as the input embeddings of certain phrases.

    Each occurrence of a phrase takes as many token positions as it has vectors. Their ids lie beyond the vocabulary, so
    they are located like those of any phrase.

    Args:
        encoder: The text encoder to wrap.
        vectors: By phrase, such as ``"<concept>"`` (case-insensitive), its vectors ``(n, d_token)``.

    Raises:
        ModelError: The encoder is not a :class:`CLIPText`.
        RequestError: The vectors do not fit, or a phrase is empty or given twice.
    """

    def __init__(self, encoder: CLIPText, vectors: Mapping[str, Tensor]) -> None:
        if not isinstance(encoder, CLIPText):
            raise ModelError(
                f"Learned vectors need the CLIP text encoder of SD1 or SD2, not {type(encoder).__name__}: give the "
                "concept by name."
            )
        self.encoder = encoder
        self.max_length = encoder.max_length
        self.layer = encoder.layer
        self._embedding: nn.Embedding = encoder.model.get_input_embeddings()
        rows, width = self._embedding.weight.shape
        self.vectors: dict[str, Tensor] = {}
        self._ids: dict[str, list[int]] = {}
        for phrase, embeddings in vectors.items():
            name = normalized_phrase(phrase)
            if not name or name in self._ids:
                raise RequestError(f"The phrase '{phrase}' for learned vectors is empty or given twice.")
            if embeddings.ndim != 2 or embeddings.shape[1] != width or not len(embeddings):
                raise RequestError(
                    f"The vectors for '{phrase}' have the shape {tuple(embeddings.shape)}; this text encoder's are "
                    f"(number, {width})."
                )
            first = rows + sum(map(len, self._ids.values()))
            self._ids[name] = list(range(first, first + len(embeddings)))
            self.vectors[name] = embeddings
        if not self._ids:
            raise RequestError("There are no vectors: give at least one phrase with its vectors.")
        self._first = rows
        # the longest first, because a phrase may begin with another one
        self._pattern = re.compile(
            "|".join(_phrase_pattern(name) for name in sorted(self._ids, key=len, reverse=True)), re.IGNORECASE
        )

    def phrase_ids(self, phrase: str) -> list[int]:
        phrase = unicodedata.normalize("NFC", phrase)
        ids, at = [], 0
        for match in self._pattern.finditer(phrase):
            ids += self._plain_ids(phrase[at : match.start()]) + self._ids[normalized_phrase(match[0])]
            at = match.end()
        return ids + self._plain_ids(phrase[at:])

    def _plain_ids(self, text: str) -> list[int]:
        return self.encoder.phrase_ids(text) if text.strip() else []

    def token_ids(self, prompt: str) -> list[int]:
        if self._pattern.search(unicodedata.normalize("NFC", prompt)) is None:
            return self.encoder.token_ids(prompt)
        start, end, *padding = self.encoder.token_ids("")
        ids = self.phrase_ids(prompt)[: self.max_length - 2]
        return [start, *ids, end, *padding[len(ids) :]]

    def encode(self, prompts: Sequence[str]) -> TextStates:
        with torch.no_grad():
            return self.states(prompts)

    def states(self, prompts: Sequence[str]) -> TextStates:
        """As :meth:`encode`, but differentiable in the vectors."""
        weight = self._embedding.weight
        ids = torch.tensor([self.token_ids(prompt) for prompt in prompts], device=weight.device)
        slots = ids >= self._first
        vectors = torch.cat([embeddings.to(weight.device) for embeddings in self.vectors.values()])
        chosen = vectors[ids[slots] - self._first].to(weight.dtype)
        # the embedding table needs an id of its own in every slot; the hook replaces what it yields
        plain = torch.where(slots, ids[:, -1:], ids)

        def insert(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output.index_put((slots,), chosen.to(output.dtype))

        # a hook, because CLIPTextModel does not accept embeddings in older versions of transformers
        handle = self._embedding.register_forward_hook(insert)
        try:
            return self.encoder.states(plain)
        finally:
            handle.remove()


def _phrase_pattern(name: str) -> str:
    # match whole words: "sks" does not occur in "asks"; "<concept>" has no word characters at its ends
    before = r"(?<!\w)" if re.match(r"\w", name) else ""
    after = r"(?!\w)" if re.search(r"\w$", name) else ""
    return before + r"\s+".join(map(re.escape, name.split())) + after


def with_vectors(model: LatentDiffusion, vectors: Mapping[str, Tensor]) -> LatentDiffusion:
    """A copy of a model, with shared modules, whose prompts may contain phrases with learned vectors.

    Its hash differs from the model's, so that images cached for some vectors are not used for others.

    Args:
        model: The model.
        vectors: By phrase its vectors, as for :class:`InvertedText`, which also says what is raised.
    """
    extended = copy.copy(model)
    extended.__dict__.pop("model_hash", None)
    extended._known_hash = key_of(model.model_hash, dict(vectors))
    extended.text = InvertedText(model.text, vectors)  # type: ignore[arg-type]  # it checks the type itself
    return extended


@dataclass(frozen=True)
class InversionSettings:
    """How vectors are learned; the defaults of ``tokens``, ``steps`` and ``lr`` are Forget-Me-Not's.

    Args:
        tokens: Number of vectors.
        steps: Training steps.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        batch_size: Images per step.
        templates: Prompts with one ``{}`` each, which the vectors take the place of.
        init: Phrase whose token embeddings initialize the vectors, repeated if there are fewer; ``None``: random
            vectors with the mean and the standard deviation of the embedding table.

    Raises:
        RequestError: A value is out of range.
    """

    tokens: int = 4
    steps: int = 500
    lr: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 4
    templates: tuple[str, ...] = ("a photo of {}", "a picture of {}", "{}")
    init: str | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise RequestError(f"The inversion's '{name}' must be at least 1.")
        if self.lr <= 0 or self.weight_decay < 0:
            raise RequestError("The inversion's 'lr' must be above 0 and its 'weight_decay' at least 0.")
        if not self.templates or any(template.count("{}") != 1 for template in self.templates):
            raise RequestError("The inversion's 'templates' must be one or more prompts with exactly one '{}' each.")


def invert(
    model: LatentDiffusion,
    latents: Tensor,
    settings: InversionSettings | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Learn the vectors of a concept from images.

    Minimizes ``E ‖ε − ε_θ(x_t, t, c(v))‖²`` over images, templates, time steps and noise in ``v``. The model is
    restored bit-exactly, and the result is deterministic under the seed on one device.

    Args:
        model: The base model.
        latents: The images' latents, ``(m, 4, h, w)``.
        settings: How to learn.
        seed: Seed of the initial vectors and of training.
        progress: Called with every step; may raise :class:`Cancelled`.
        workspace: Folder of cached results. A finished inversion is read, an interrupted one is resumed.

    Returns:
        ``(tokens, d_token)``, fp32 on the CPU.

    Raises:
        ModelError: The text encoder is not a :class:`CLIPText`.
        RequestError: The latents do not fit the model, or are not finite.
        ForgetConceptError: As :func:`train`, or no gradient reached the vectors.

    Reference:
        Gal et al., Textual Inversion, arXiv 2208.01618, equation 2.
    """
    settings = settings or InversionSettings()
    if latents.ndim != 4 or tuple(latents.shape[1:]) != tuple(model.latent_shape) or not len(latents):
        raise RequestError(
            f"The images' latents have the shape {tuple(latents.shape)}, and this model's are (number, "
            f"{', '.join(map(str, model.latent_shape))})."
        )
    if not torch.isfinite(latents).all():
        raise RequestError("The images' latents contain values that are not finite: run the autoencoder in fp32.")
    encoder = model.text
    if not isinstance(encoder, CLIPText):
        raise ModelError(
            "Textual inversion needs gradients through the text encoder, which only the CLIP of SD1 and SD2 supports "
            f"here, not {type(encoder).__name__}: give the concept by name."
        )
    latents = latents.detach().float().cpu()
    key = ""
    if workspace is not None:
        encoder_key = key_of(dict(encoder.model.state_dict()), encoder.layer)
        key = key_of("inversion", model.model_hash, encoder_key, latents, asdict(settings), seed)
        shapes = {"vectors": (settings.tokens, None)}
        if (found := workspace.load("inversion", key, shapes)) is not None:
            return found["vectors"]
    generator = torch.Generator("cpu").manual_seed(seed)
    # tensors made in a host's inference mode could not take part in autograd
    with frozen(model.unet, encoder.model):
        start = _initial_vectors(encoder, settings, generator)
        vectors = _TrainableVectors(start)
        train(
            model,
            vectors,
            _DenoisingObjective(model, encoder, latents, vectors.parameter, settings, generator),
            TrainingSettings(settings.steps, settings.lr, settings.weight_decay),
            progress,
            message="learning vectors of the images",
            checkpoint=Checkpoint(workspace, key) if workspace is not None else None,
        )
        learned = vectors.parameter.detach().cpu().clone()
    if torch.equal(learned, start.cpu()):
        raise ForgetConceptError(
            "Textual inversion learned nothing: no gradient reached the vectors. Run the model in full precision."
        )
    if workspace is not None:
        workspace.save("inversion", key, {"vectors": learned})
    return learned


class _TrainableVectors:
    """The vectors as what the training loop optimizes; there is nothing to attach to the model."""

    def __init__(self, start: Tensor) -> None:
        self.parameter = nn.Parameter(start.clone())

    def parameters(self) -> list[nn.Parameter]:
        return [self.parameter]

    @contextmanager
    def attached(self) -> Iterator[_TrainableVectors]:
        yield self


def _initial_vectors(encoder: CLIPText, settings: InversionSettings, generator: torch.Generator) -> Tensor:
    table: Tensor = encoder.model.get_input_embeddings().weight.detach()
    if settings.init is not None:
        ids = encoder.phrase_ids(settings.init)
        if not 0 < len(ids) <= settings.tokens:
            raise RequestError(
                f"The inversion's 'init', '{settings.init}', has {len(ids)} tokens: it must be 1 to {settings.tokens}, "
                "the number of vectors."
            )
        start: Tensor = table[[ids[i % len(ids)] for i in range(settings.tokens)]].float()
        return start
    mean, spread = table.float().mean(0), table.float().std(0)
    drawn = torch.randn(settings.tokens, table.shape[1], generator=generator)
    return mean + spread * drawn.to(table.device)


class _DenoisingObjective:
    """The denoising loss of images under prompts that contain the vectors; an :class:`Objective`."""

    def __init__(
        self,
        model: LatentDiffusion,
        encoder: CLIPText,
        latents: Tensor,
        vectors: nn.Parameter,
        settings: InversionSettings,
        generator: torch.Generator,
    ) -> None:
        self.model, self.latents, self.batch, self.generator = model, latents, settings.batch_size, generator
        self.text = InvertedText(encoder, {PLACEHOLDER: vectors})
        self.prompts = [template.format(PLACEHOLDER) for template in settings.templates]
        for prompt in self.prompts:
            end_position(self.text, prompt)  # raises if the prompt is cut off

    def state(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])

    def _random_indices(self, below: int) -> Tensor:
        return torch.randint(below, (self.batch,), generator=self.generator)

    def __call__(self, step: int) -> Terms:
        x0 = self.latents[self._random_indices(len(self.latents))].to(self.model.device)
        prompts: list[Any] = [self.prompts[i] for i in self._random_indices(len(self.prompts)).tolist()]
        times = self._random_indices(self.model.train_steps)
        noise = torch.randn(x0.shape, generator=self.generator).to(self.model.device)
        predicted = self.model.predict_noise(self.model.add_noise(x0, noise, times), times, self.text.states(prompts))
        return {"denoising": Term(noise_matching(predicted, noise))}
