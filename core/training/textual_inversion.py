"""Textual inversion: new token vectors that stand for what some pictures show.

Gal et al., *An Image is Worth One Word* (arXiv 2208.01618), with several vectors for one concept, as Forget-Me-Not
(arXiv 2303.17591, §3.1) uses it: the denoising loss on the pictures, through the frozen UNet and the frozen text
encoder, down to the vectors alone. No token is added to a tokenizer and no weight is written; the vectors take their
places while a prompt is encoded, and nothing is left behind.
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
from ..models.text_encoders import CLIPText, TextStates
from ..models.token_positions import end_position
from ..progress import Progress
from ..request.concept import normalized_phrase
from .frozen import frozen
from .loop import Checkpoint, Term, Terms, TrainingSettings, train
from .losses import noise_matching

__all__ = ["PLACEHOLDER", "InversionSettings", "InvertedText", "invert", "with_vectors"]

PLACEHOLDER = "<concept>"


class InvertedText:
    """A :class:`TextEncoder` that reads given vectors where a prompt says certain words.

    ``vectors`` maps the words (``"<concept>"``; upper and lower case alike) to ``(n, d_token)``: each occurrence takes
    ``n`` positions, whose input embeddings are the vectors. All else is as in the ``encoder`` it wraps. The ids there
    lie beyond the vocabulary, so that they are found like those of any phrase. Raises :class:`ModelError` for
    an encoder that is no :class:`CLIPText`, and :class:`RequestError` for vectors that do not fit.
    """

    def __init__(self, encoder: CLIPText, vectors: Mapping[str, Tensor]) -> None:
        if not isinstance(encoder, CLIPText):
            raise ModelError(
                f"Vectors can stand in for words in a CLIP text encoder of SD1 or SD2 only, not in "
                f"{type(encoder).__name__}: give the concept by name."
            )
        self.encoder = encoder
        self.max_length = encoder.max_length
        self.layer = encoder.layer
        self._embedding: nn.Embedding = encoder.model.get_input_embeddings()
        rows, width = self._embedding.weight.shape
        self.vectors: dict[str, Tensor] = {}
        self._ids: dict[str, list[int]] = {}
        for words, several in vectors.items():
            name = normalized_phrase(words)
            if not name or name in self._ids:
                raise RequestError(f"The words '{words}' that vectors stand in for are empty or given twice.")
            if several.ndim != 2 or several.shape[1] != width or not len(several):
                raise RequestError(
                    f"The vectors for '{words}' are {tuple(several.shape)}; this text encoder's are (number, {width})."
                )
            taken = rows + sum(map(len, self._ids.values()))
            self._ids[name] = list(range(taken, taken + len(several)))
            self.vectors[name] = several
        if not self._ids:
            raise RequestError("There are no vectors to stand in for any words.")
        self._first = rows
        # the longest first, so that no words hide others that begin like them
        self._words = re.compile(
            "|".join(_pattern(name) for name in sorted(self._ids, key=len, reverse=True)), re.IGNORECASE
        )

    def phrase_ids(self, phrase: str) -> list[int]:
        phrase = unicodedata.normalize("NFC", phrase)
        ids, at = [], 0
        for match in self._words.finditer(phrase):
            ids += self._plain(phrase[at : match.start()]) + self._ids[normalized_phrase(match[0])]
            at = match.end()
        return ids + self._plain(phrase[at:])

    def _plain(self, words: str) -> list[int]:
        return self.encoder.phrase_ids(words) if words.strip() else []

    def token_ids(self, prompt: str) -> list[int]:
        if self._words.search(unicodedata.normalize("NFC", prompt)) is None:
            return self.encoder.token_ids(prompt)
        start, end, *padding = self.encoder.token_ids("")
        words = self.phrase_ids(prompt)[: self.max_length - 2]
        return [start, *words, end, *padding[len(words) :]]

    def encode(self, prompts: Sequence[str]) -> TextStates:
        with torch.no_grad():
            return self.states(prompts)

    def states(self, prompts: Sequence[str]) -> TextStates:
        """As :meth:`encode`, differentiable in the vectors where gradients are on."""
        weight = self._embedding.weight
        ids = torch.tensor([self.token_ids(prompt) for prompt in prompts], device=weight.device)
        slots = ids >= self._first
        vectors = torch.cat([several.to(weight.device) for several in self.vectors.values()])
        chosen = vectors[ids[slots] - self._first].to(weight.dtype)
        # an id the table has stands in for each slot's; what it yields is replaced
        plain = torch.where(slots, ids[:, -1:], ids)

        def put(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output.index_put((slots,), chosen.to(output.dtype))

        # by a hook, because older CLIPTextModels take no embeddings
        handle = self._embedding.register_forward_hook(put)
        try:
            return self.encoder.states(plain)
        finally:
            handle.remove()


def _pattern(name: str) -> str:
    # "sks" is not to be found in "asks"; "<concept>" has no such ends
    before = r"(?<!\w)" if re.match(r"\w", name) else ""
    after = r"(?!\w)" if re.search(r"\w$", name) else ""
    return before + r"\s+".join(map(re.escape, name.split())) + after


def with_vectors(model: LatentDiffusion, vectors: Mapping[str, Tensor]) -> LatentDiffusion:
    """The same model, its modules shared, whose prompts may say the words that ``vectors`` stand in for.

    Its hash is another one, so that pictures kept for some vectors are never taken for those of others. Raises as
    :class:`InvertedText`.
    """
    reading = copy.copy(model)
    reading.__dict__.pop("model_hash", None)
    reading._known_hash = key_of(model.model_hash, dict(vectors))
    reading.text = InvertedText(model.text, vectors)  # type: ignore[arg-type]  # it says itself what it cannot wrap
    return reading


@dataclass(frozen=True)
class InversionSettings:
    """How vectors are learned; the defaults for ``tokens``, ``steps`` and ``lr`` are Forget-Me-Not's.

    ``tokens``: how many vectors. ``steps``, ``lr``, ``weight_decay``, ``batch_size``: AdamW's. ``templates``: prompts
    with one ``{}`` each, in which the vectors stand for the concept. ``init``: words whose vectors they start from,
    over and over where there are fewer; without them they are drawn like the text encoder's own ones.
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
            raise RequestError("The inversion's templates must be one or more prompts with exactly one '{}' each.")


def invert(
    model: LatentDiffusion,
    latents: Tensor,
    settings: InversionSettings | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Vectors ``(tokens, d_token)``, fp32 on the CPU, that stand for what ``latents`` ``(m, 4, h, w)`` show.

    ``E ‖ε − ε_θ(x_t, t, c(v))‖²`` over pictures, templates, times and noise is made small in ``v`` (arXiv 2208.01618,
    eq. 2). The model is given back bit for bit, and the result is the same for the same seed on one device. With a
    ``workspace`` a finished inversion is taken from it, and one that was cut short goes on to the same result. Raises
    :class:`ModelError` for a text encoder that cannot take vectors, :class:`RequestError` for latents of another model,
    and :class:`ForgetConceptError` and :class:`Cancelled` as :func:`train`.
    """
    settings = settings or InversionSettings()
    if latents.ndim != 4 or tuple(latents.shape[1:]) != tuple(model.latent_shape) or not len(latents):
        raise RequestError(
            f"The pictures' latents are {tuple(latents.shape)}, and this model's are (number, "
            f"{', '.join(map(str, model.latent_shape))})."
        )
    if not torch.isfinite(latents).all():
        raise RequestError("The pictures' latents hold values that are not finite numbers.")
    encoder = model.text
    if not isinstance(encoder, CLIPText):
        raise ModelError(
            "Textual inversion needs gradients through the text encoder, which only SD1's and SD2's CLIP gives here, "
            f"not {type(encoder).__name__}: give the concept by name."
        )
    latents = latents.detach().float().cpu()
    key = ""
    if workspace is not None:
        text = key_of(dict(encoder.model.state_dict()), encoder.layer)
        key = key_of("inversion", model.model_hash, text, latents, asdict(settings), seed)
        if (found := workspace.load("inversion", key)) is not None:
            return found["vectors"]
    generator = torch.Generator("cpu").manual_seed(seed)
    # what is made here must not be made in a host's inference mode, or it could not take part in a gradient
    with frozen(model.unet, encoder.model):
        start = _start(encoder, settings, generator)
        vectors = _Vectors(start)
        train(
            model,
            vectors,
            _Denoising(model, encoder, latents, vectors.parameter, settings, generator),
            TrainingSettings(settings.steps, settings.lr, settings.weight_decay),
            progress,
            message="inverting pictures into words",
            checkpoint=Checkpoint(workspace, key) if workspace is not None else None,
        )
        learned = vectors.parameter.detach().cpu().clone()
    if torch.equal(learned, start.cpu()):
        raise ForgetConceptError(
            "The pictures taught nothing: no gradient reached the vectors. Run the model in full precision."
        )
    if workspace is not None:
        workspace.save("inversion", key, {"vectors": learned})
    return learned


class _Vectors:
    """What the training loop moves: one parameter, and nothing to attach to the model."""

    def __init__(self, start: Tensor) -> None:
        self.parameter = nn.Parameter(start.clone())

    def parameters(self) -> list[nn.Parameter]:
        return [self.parameter]

    @contextmanager
    def attached(self) -> Iterator[_Vectors]:
        yield self


def _start(encoder: CLIPText, settings: InversionSettings, generator: torch.Generator) -> Tensor:
    table: Tensor = encoder.model.get_input_embeddings().weight.detach()
    if settings.init is not None:
        ids = encoder.phrase_ids(settings.init)
        if not 0 < len(ids) <= settings.tokens:
            raise RequestError(
                f"The words '{settings.init}' to start the inversion from have {len(ids)} tokens: it must be 1 to "
                f"{settings.tokens} for as many vectors."
            )
        start: Tensor = table[[ids[i % len(ids)] for i in range(settings.tokens)]].float()
        return start
    mean, spread = table.float().mean(0), table.float().std(0)
    drawn = torch.randn(settings.tokens, table.shape[1], generator=generator)
    return mean + spread * drawn.to(table.device)


class _Denoising:
    """The denoising loss of some pictures under prompts that say the vectors; an :class:`Objective`."""

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
            end_position(self.text, prompt)  # raises where it is cut off

    def state(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])

    def _drawn(self, below: int) -> Tensor:
        return torch.randint(below, (self.batch,), generator=self.generator)

    def __call__(self, step: int) -> Terms:
        x0 = self.latents[self._drawn(len(self.latents))].to(self.model.device)
        said: list[Any] = [self.prompts[i] for i in self._drawn(len(self.prompts)).tolist()]
        times = self._drawn(self.model.train_steps)
        noise = torch.randn(x0.shape, generator=self.generator).to(self.model.device)
        predicted = self.model.predict_noise(self.model.add_noise(x0, noise, times), times, self.text.states(said))
        return {"denoising": Term(noise_matching(predicted, noise))}
