"""Forget-Me-Not: attention re-steering, trained end to end.

Zhang et al., *Forget-Me-Not: Learning to Forget in Text-to-Image Diffusion Models* (arXiv 2303.17591). At a random time
step one conditional pass is made; at every cross-attention site ``l`` the attention of the concept's own tokens ``S``
is looked at, and ``L = ‖concat_l A_l[..., S]‖₂`` made small, so that no pixel looks at the concept any more.

The published method keeps nothing and replaces nothing. Two optional terms here do: ``preserve_weight`` keeps the noise
prediction on preserved prompts (the empty one always among them) where the base model has it, and ``steer_weight``
moves the concept's prediction to the base model's of its replacement (Concept Ablation's target, arXiv 2303.13516).
Where a term is off and a request asks for what it does, the request is refused: nothing is ignored in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..attention import AttentionRecorder, token_mask
from ..concepts import Concept, ForgetRequest, templates
from ..diffusion import LatentDiffusion
from ..errors import RequestError
from ..losses import attention_resteering, noise_matching
from ..patch import Patch
from ..progress import Progress
from ..text import TextEncoder, TextStates, end_position, token_positions
from ..training import Deltas, Terms, TrainingSettings, borrowed, train
from ..unet import PROJECTIONS
from . import Method, register
from .uce import check_template

__all__ = ["ForgetMeNot", "ForgetMeNotSettings", "concept_positions"]


@dataclass(frozen=True)
class ForgetMeNotSettings:
    """Settings of :class:`ForgetMeNot`.

    ``steps``, ``lr``, ``weight_decay``, ``batch_size``: AdamW's; ``clip_norm`` bounds the gradient's norm (``None``:
    not). ``train``: which projections of every cross-attention. ``rank``: of the trained LoRA; ``None`` trains dense
    deltas, which are factored at the end (``max_rank`` cuts them then). ``latents``: the pictures that are noised,
    ``"zeros"`` (none) or ``"generated"``, ``n_images`` of the concept by the model itself in ``sample_steps`` steps at
    ``guidance``. ``templates``: prompts with ``{}`` (default: the kind's; with ``one_template`` only the first).
    ``include_end``: the first end-of-text token counts as the concept's too (never the padding, which in SD1 has the
    same id). ``attention_weight``, ``preserve_weight``, ``steer_weight``: of the three terms, set against one another
    as root-mean-square mass and mean squared noise, so that they carry over between models of any size.
    """

    steps: int = 35
    lr: float = 2e-4
    weight_decay: float = 0.01
    batch_size: int = 4
    clip_norm: float | None = None
    train: tuple[str, ...] = ("to_q", "to_k")
    rank: int | None = 8
    max_rank: int | None = None
    latents: Literal["zeros", "generated"] = "generated"
    n_images: int = 8
    sample_steps: int = 20
    guidance: float = 5.0
    templates: tuple[str, ...] | None = None
    one_template: bool = False
    include_end: bool = False
    attention_weight: float = 1.0
    preserve_weight: float = 1.0
    steer_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.train or set(self.train) - set(PROJECTIONS) or len(set(self.train)) != len(self.train):
            raise RequestError(f"The setting 'train' must name some of {', '.join(PROJECTIONS)}, each once.")
        for name in ("steps", "batch_size", "n_images", "sample_steps"):
            if getattr(self, name) < 1:
                raise RequestError(f"The setting '{name}' must be at least 1.")
        for name in ("rank", "max_rank"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RequestError(f"The setting '{name}' must be at least 1, or null.")
        if self.lr <= 0 or (self.clip_norm is not None and self.clip_norm <= 0):
            raise RequestError("'lr' and 'clip_norm' must be above 0.")
        for name in ("weight_decay", "attention_weight", "preserve_weight", "steer_weight"):
            if getattr(self, name) < 0:
                raise RequestError(f"The setting '{name}' must be at least 0.")
        if self.attention_weight == 0 and self.steer_weight == 0:
            raise RequestError("With 'attention_weight' and 'steer_weight' both 0 nothing would be forgotten.")
        for template in self.templates or ():
            check_template(template)
        if self.templates == ():
            raise RequestError("The setting 'templates' is an empty list: leave it out for the kind's own.")


@dataclass(frozen=True)
class _Prompt:
    """One way to say a concept: its name, the whole prompt, its positions, the replacement's prompt, if any."""

    concept: str
    text: str
    positions: list[int]
    instead: str | None


def concept_positions(encoder: TextEncoder, phrase: str, prompt: str, include_end: bool = False) -> list[int]:
    """``S``: every sub-word of every occurrence and, if wanted, the first end-of-text token.

    Raises :class:`TokenError` where there is none or the prompt is cut off.
    """
    positions = token_positions(encoder, phrase, prompt)
    end = end_position(encoder, prompt)
    return [*positions, end] if include_end else positions


@register
class ForgetMeNot(Method):
    """Attention re-steering end to end; seconds to minutes, by the model's size."""

    id = "forget_me_not"
    title = "Forget-Me-Not (attention re-steering)"
    paper = "https://arxiv.org/abs/2303.17591"
    Settings = ForgetMeNotSettings
    presets = {
        # the authors': attn2 whole, dense, batch 1, 35 steps; nothing kept, nothing replaced
        "published": ForgetMeNotSettings(
            lr=2e-6,
            batch_size=1,
            train=PROJECTIONS,
            rank=None,
            one_template=True,
            preserve_weight=0.0,
            steer_weight=0.0,
        ),
        "tuned": ForgetMeNotSettings(),
    }

    def fit(
        self,
        model: LatentDiffusion,
        request: ForgetRequest,
        settings: ForgetMeNotSettings,
        progress: Progress | None = None,
    ) -> Patch:
        """Train the deltas and return them; deterministic under the request's seed on one device."""
        _refuse_what_would_be_ignored(request, settings)
        prompts = [p for concept in request.concepts for p in _prompts(model.text, concept, settings)]
        kept = _kept_prompts(model.text, request, settings)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        # what is made here must not be made in a host's inference mode, or it could not take part in a gradient
        with borrowed(model.unet):
            step = _Step(model, settings, prompts, kept, generator, progress)
            train(
                model,
                step.deltas,
                step,
                TrainingSettings(settings.steps, settings.lr, settings.weight_decay, settings.clip_norm),
                progress,
                message="re-steering attention",
            )
            factors = step.deltas.factors(settings.max_rank)
        metadata = {"forget_concept.trained": ",".join(settings.train)}
        if model.survey.family == "sdxl":
            metadata["forget_concept.note"] = (
                "SDXL also takes the concept in through the pooled text vector, which this edit leaves as it is."
            )
        return Patch(factors, metadata)


def _refuse_what_would_be_ignored(request: ForgetRequest, settings: ForgetMeNotSettings) -> None:
    replaced = [concept.name for concept in request.concepts if concept.instead]
    if replaced and settings.steer_weight == 0:
        raise RequestError(
            f"Forget-Me-Not as published replaces nothing, and '{replaced[0]}' has a replacement: leave it out, set "
            "'steer_weight' above 0, or use another preset or method."
        )
    if request.preserve and settings.preserve_weight == 0:
        raise RequestError(
            "Forget-Me-Not as published preserves nothing, and there is a preserve list: leave it out, set "
            "'preserve_weight' above 0, or use another preset or method."
        )
    if settings.attention_weight == 0 and len(replaced) < len(request.concepts):
        bare = next(concept.name for concept in request.concepts if not concept.instead)
        raise RequestError(
            f"With 'attention_weight' 0 nothing would make the model forget '{bare}': give a replacement."
        )


def _templates(settings: ForgetMeNotSettings, kind: str) -> tuple[str, ...]:
    found = settings.templates or templates(kind)
    return found[:1] if settings.one_template else found


def _prompts(encoder: TextEncoder, concept: Concept, settings: ForgetMeNotSettings) -> list[_Prompt]:
    found = []
    for template in _templates(settings, concept.kind):
        text = template.format(concept.name)
        positions = concept_positions(encoder, concept.name, text, settings.include_end)
        instead = template.format(concept.instead) if concept.instead else None
        if instead is not None:
            end_position(encoder, instead)  # raises where it is cut off
        found.append(_Prompt(concept.name, text, positions, instead))
    return found


def _kept_prompts(encoder: TextEncoder, request: ForgetRequest, settings: ForgetMeNotSettings) -> list[str]:
    """The empty prompt and every preserved word in the templates of the request's kinds; none where nothing is kept."""
    if settings.preserve_weight == 0:
        return []
    said = [
        template.format(phrase)
        for phrase in request.preserve
        for kind in dict.fromkeys(concept.kind for concept in request.concepts)
        for template in _templates(settings, kind)
    ]
    for prompt in said:
        end_position(encoder, prompt)
    return list(dict.fromkeys(["", *said]))


class _Step:
    """The terms of one step: prompts, pictures, time and noise drawn from one generator, the losses of METHODS §1."""

    def __init__(
        self,
        model: LatentDiffusion,
        settings: ForgetMeNotSettings,
        prompts: list[_Prompt],
        kept: list[str],
        generator: torch.Generator,
        progress: Progress | None,
    ) -> None:
        self.model, self.settings, self.prompts, self.kept = model, settings, prompts, kept
        self.generator = generator
        texts = list(dict.fromkeys([p.text for p in prompts] + [p.instead for p in prompts if p.instead] + kept))
        self.row = {text: i for i, text in enumerate(texts)}
        self.states = TextStates.cat([model.text.encode(texts[i : i + 64]) for i in range(0, len(texts), 64)]).to(
            model.device
        )
        self.keys = [site.key(which) for site in model.survey for which in settings.train]
        self.deltas = Deltas(model, self.keys, settings.rank, generator)
        self.images: dict[str, Tensor] = {}
        if settings.latents == "generated":
            self._draw_images(progress)
        self.turn: list[int] = []

    def _draw_images(self, progress: Progress | None) -> None:
        """``n_images`` of each concept, and as many of what is kept, all by the model as it is; ``x_0`` by name."""
        s = self.settings
        of: dict[str, list[str]] = {}
        for prompt in self.prompts:
            of.setdefault(prompt.concept, []).append(prompt.text)
        wanted = [(name, texts[i % len(texts)]) for name, texts in of.items() for i in range(s.n_images)]
        if self.kept:  # a kept prompt is shown any of these: it shall stay as it is on other pictures than its own too
            chosen = torch.randperm(len(self.kept), generator=self.generator)[: s.n_images].tolist()
            wanted += [("", self.kept[i]) for i in chosen]
        seeds = torch.randint(2**62, (len(wanted),), generator=self.generator).tolist()
        latents = self.model.sample(
            [text for _, text in wanted], seeds, s.sample_steps, s.guidance, progress=progress
        ).float()
        for name in dict.fromkeys(name for name, _ in wanted):
            self.images[name] = latents[[i for i, (other, _) in enumerate(wanted) if other == name]]

    def _x0(self, names: list[str]) -> Tensor:
        shape = (len(names), *self.model.latent_shape)
        if not self.images:
            return torch.zeros(shape, device=self.model.device)
        rows = []
        for name in names:
            pool = self.images[name]
            rows.append(pool[int(torch.randint(len(pool), (1,), generator=self.generator))])
        return torch.stack(rows)

    def _noised(self, names: list[str]) -> tuple[Tensor, Tensor]:
        x0 = self._x0(names)
        times = torch.randint(self.model.train_steps, (len(names),), generator=self.generator)
        noise = torch.randn(x0.shape, generator=self.generator).to(x0.device)
        return self.model.add_noise(x0, noise, times), times

    def _next_prompts(self) -> list[_Prompt]:
        # in shuffled rounds, so that no concept waits long for its turn
        while len(self.turn) < self.settings.batch_size:
            self.turn += torch.randperm(len(self.prompts), generator=self.generator).tolist()
        taken, self.turn = self.turn[: self.settings.batch_size], self.turn[self.settings.batch_size :]
        return [self.prompts[i] for i in taken]

    def _states(self, texts: list[str]) -> TextStates:
        return self.states.index([self.row[text] for text in texts])

    def _base(self, x: Tensor, times: Tensor, texts: list[str]) -> Tensor:
        with torch.no_grad(), self.deltas.disabled():
            return self.model.predict_noise(x, times, self._states(texts))

    def __call__(self, step: int) -> Terms:
        s, model = self.settings, self.model
        terms: dict[str, tuple[float, Tensor]] = {}
        batch = self._next_prompts()
        x, times = self._noised([prompt.concept for prompt in batch])
        states = self._states([prompt.text for prompt in batch])
        mask = token_mask([prompt.positions for prompt in batch], states.hidden.shape[1], x.device)
        # entered after the deltas were attached: what is recorded has them in it
        scale = 1.0
        with AttentionRecorder(model.survey) as recorder:
            predicted = model.predict_noise(x, times, states)
            if s.attention_weight:
                masses = recorder.masses(mask)
                terms["attention"] = (s.attention_weight, attention_resteering(masses))
                # the published norm grows with the root of their number, a mean does not: brought to one scale
                scale = sum(mass.numel() for mass in masses) ** 0.5
        steered = [i for i, prompt in enumerate(batch) if prompt.instead is not None]
        if s.steer_weight and steered:
            wanted = self._base(x[steered], times[steered], [batch[i].instead or "" for i in steered])
            terms["steer"] = (scale * s.steer_weight, noise_matching(predicted[steered], wanted))
        if self.kept:
            # the empty prompt in every step, the others in turn
            drawn = torch.randint(len(self.kept), (s.batch_size,), generator=self.generator).tolist()
            texts = ["", *(self.kept[i] for i in drawn[1:])]
            x, times = self._noised([""] * len(texts))
            now = model.predict_noise(x, times, self._states(texts))
            terms["preserve"] = (scale * s.preserve_weight, noise_matching(now, self._base(x, times, texts)))
        return terms
