"""Base of the trained methods: their common settings, prompts, pictures, and the one way through the loop.

A method says which terms its loss has (:meth:`TrainedMethod.objective`); everything else is here, so that every one of
them takes the same inputs, can be cancelled and resumed, and gives a patch of bounded rank.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import RequestError
from ..files.workspace import key_of
from ..models.latent_diffusion import LatentDiffusion
from ..models.text_encoders import TextEncoder
from ..models.token_positions import end_position
from ..models.unet import PROJECTIONS
from ..patch.history import read_history
from ..patch.metadata import PatchMetadata
from ..patch.patch import Patch
from ..progress import Progress
from ..prompts.everyday import CONTEXTS
from ..prompts.pairs import given_pairs, mentions, prompt_pairs
from ..prompts.phrases import replace_phrase
from ..request.concept import Concept, templates
from ..request.request import ForgetRequest
from ..training.adapters import Deltas
from ..training.batches import RETAIN_POOL, BatchSampler, GenerationSettings, TargetPrompt, target_prompt
from ..training.frozen import frozen
from ..training.loop import Checkpoint, Objective, Term, Terms, TrainingSettings, train
from ..training.losses import noise_matching
from ..version import VERSION
from .base import Inputs, Method
from .uce import check_template

__all__ = ["BaseObjective", "TrainedMethod", "TrainedSettings"]


@dataclass(frozen=True)
class TrainedSettings:
    """Settings that all trained methods share.

    ``steps``, ``lr``, ``weight_decay``, ``batch_size``, ``optimiser``: the optimiser's; ``clip_norm`` bounds the
    gradient's norm (``None``: not). ``gradient``: how forgetting and keeping are reconciled, with weight ``alpha``
    (:class:`TrainingSettings`). ``train``: which projections of every cross-attention. ``rank``: of the
    trained LoRA; ``None`` trains dense deltas, which are factored at the end (``max_rank`` cuts them then).
    ``latents``: the pictures that are noised: ``"zeros"`` (none), ``"generated"`` (``n_images`` of each concept by the
    model itself, in ``sample_steps`` steps at ``guidance``, ``None`` for the model's usual one) or the person's own
    ``"images"``. ``templates``: prompts with ``{}`` (default: the kind's; with ``one_template`` only the first);
    ``contexts``: the kind's everyday contexts too, beside colours, styles and backgrounds. ``diverse``: that many
    prompts of each concept from a written ``grammar`` instead, each with its pair without the concept to be kept;
    ``forget_prompts`` and ``retain_prompts``: one's own. ``include_end``: the first end-of-text token counts as the
    concept's too (never the padding, which in SD1 has the same id). ``preserve_weight``: of keeping the base model's
    prediction on what is kept. ``earlier_weight``: of keeping forgotten what earlier requests of a sequence forgot.
    """

    steps: int = 35
    lr: float = 2e-4
    weight_decay: float = 0.01
    batch_size: int = 4
    clip_norm: float | None = None
    optimiser: Literal["adamw", "sgd"] = "adamw"
    gradient: Literal["sum", "restricted", "restricted_step"] = "sum"
    alpha: float = 1.0
    train: tuple[str, ...] = ("to_q", "to_k")
    rank: int | None = 8
    max_rank: int | None = None
    latents: Literal["zeros", "generated", "images"] = "generated"
    n_images: int = 8
    sample_steps: int = 16
    guidance: float | None = None
    templates: tuple[str, ...] | None = None
    one_template: bool = False
    contexts: bool = False
    diverse: int = 0
    grammar: Literal["general", "embedded"] = "general"
    forget_prompts: tuple[str, ...] = ()
    retain_prompts: tuple[str, ...] = ()
    include_end: bool = False
    preserve_weight: float = 1.0
    earlier_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.train or set(self.train) - set(PROJECTIONS) or len(set(self.train)) != len(self.train):
            raise RequestError(f"The setting 'train' must name some of {', '.join(PROJECTIONS)}, each once.")
        for name in ("steps", "batch_size", "n_images", "sample_steps"):
            if getattr(self, name) < 1:
                raise RequestError(f"The setting '{name}' must be at least 1.")
        for name in ("rank", "max_rank"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RequestError(f"The setting '{name}' must be at least 1, or null.")
        if self.lr <= 0 or self.alpha <= 0 or (self.clip_norm is not None and self.clip_norm <= 0):
            raise RequestError("'lr', 'alpha' and 'clip_norm' must be above 0.")
        for field in dataclasses.fields(self):
            if (field.name.endswith("_weight") or field.name in ("weight_decay", "diverse")) and (
                getattr(self, field.name) < 0
            ):
                raise RequestError(f"The setting '{field.name}' must be at least 0.")
        for template in self.templates or ():
            check_template(template)
        if self.templates == ():
            raise RequestError("The setting 'templates' is an empty list: leave it out for the kind's own.")
        if self.diverse and (self.forget_prompts or self.retain_prompts):
            raise RequestError("Give prompts of your own or 'diverse', not both.")

    def said(self, kind: str) -> tuple[str, ...]:
        """The templates for concepts of a kind, and its everyday contexts where wanted."""
        found = self.templates or templates(kind)
        if self.one_template:
            return found[:1]
        return found + CONTEXTS[kind] if self.contexts and self.templates is None else found


class BaseObjective:
    """What objectives share: the material, the frozen base model's prediction, keeping what is to be kept."""

    def __init__(self, batches: BatchSampler, deltas: Deltas) -> None:
        self.batches, self.deltas, self.model = batches, deltas, batches.model

    def predicted(self, x: Tensor, times: Tensor, texts: Sequence[str]) -> Tensor:
        """``ε_θ(x_t, t, c)`` of the model as it is now."""
        return self.model.predict_noise(x, times, self.batches.states(texts))

    def base(self, x: Tensor, times: Tensor, texts: Sequence[str]) -> Tensor:
        """The same of the base model, without gradient: drift does not compound over requests."""
        with torch.no_grad(), self.deltas.showing("base"):
            return self.predicted(x, times, texts)

    def preserve(self, weight: float, texts: Sequence[str] | None = None) -> Term:
        """Prompts that are to be kept predict what they did in the base model, on pictures of any kept one."""
        texts = self.batches.next_retain() if texts is None else texts
        batch = self.batches.noised([RETAIN_POOL] * len(texts))
        now = self.predicted(batch.x, batch.times, texts)
        return Term(noise_matching(now, self.base(batch.x, batch.times, texts)), weight, "retain")

    def preserve_earlier(self, weight: float, count: int) -> dict[str, Term]:
        """Prompts of what earlier requests forgot predict what these left, not what the base model does.

        Nothing where there are none. Without it, what is kept pulls them back to the base model.
        """
        if not weight or not self.batches.earlier:
            return {}
        texts = self.batches.next_earlier(count)
        return {"earlier": Term(self._as_earlier(texts), weight, "retain")}

    def _as_earlier(self, texts: Sequence[str]) -> Tensor:
        batch = self.batches.noised([self.any_pool()] * len(texts))
        with torch.no_grad(), self.deltas.showing("earlier"):
            wanted = self.predicted(batch.x, batch.times, texts)
        return noise_matching(self.predicted(batch.x, batch.times, texts), wanted)

    def any_pool(self) -> str:
        """Of pictures that are no concept's own, where there are such."""
        pools = self.batches.pools
        return RETAIN_POOL if RETAIN_POOL in pools or not pools else next(iter(pools))

    def __call__(self, step: int) -> Terms:
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        return self.batches.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.batches.restore(state)


class TrainedMethod(Method):
    """A method that trains deltas on the model's projections; ``Settings`` extends :class:`TrainedSettings`."""

    takes_images: ClassVar[bool] = True
    trained: ClassVar[bool] = True
    message: ClassVar[str] = "training"

    @abstractmethod
    def objective(
        self,
        batches: BatchSampler,
        deltas: Deltas,
        request: ForgetRequest,
        settings: Any,
        inputs: Inputs,
        progress: Progress | None,
    ) -> Objective:
        """The terms of the loss; pictures beyond the usual ones are drawn here. The model is frozen."""

    def refuse(self, request: ForgetRequest, settings: Any, inputs: Inputs) -> None:
        """Raise :class:`RequestError` for what this method would ignore or cannot do; before any work."""

    def keys(self, model: LatentDiffusion, settings: Any) -> list[str]:
        """The projections to train."""
        return [site.key(which) for site in model.survey for which in settings.train]

    def null_space(self, model: LatentDiffusion, batches: BatchSampler, settings: Any) -> Mapping[str, Tensor] | None:
        """Input directions that the trained change must not react to, by key (:class:`Deltas`)."""
        return None

    def drops(self, settings: Any) -> bool:
        """Whether a concept without a replacement is steered to the same prompt without it."""
        return False

    def keeps(self, settings: Any) -> bool:
        """Whether anything is kept at all under these settings."""
        return bool(settings.preserve_weight > 0)

    def uses_images(self, settings: Any) -> bool:
        """Whether a person's own pictures are looked at under these settings."""
        return bool(settings.latents == "images")

    def _refuse_without_use(self, request: ForgetRequest, settings: Any, inputs: Inputs) -> None:
        lacking = [concept.name for concept in request.concepts if concept.name not in inputs.images]
        if settings.latents == "images" and lacking:
            raise RequestError(
                f"'latents' is 'images', and there are no pictures of '{lacking[0]}': give some, or set it to "
                "'generated'."
            )
        if inputs.images and not self.uses_images(settings):
            raise RequestError(
                f"There are pictures of '{next(iter(inputs.images))}', which '{self.id}' does not look at with these "
                "settings: leave them out, or set 'latents' to 'images'."
            )
        if self.keeps(settings):
            return
        if request.preserve or settings.retain_prompts:
            raise RequestError(
                f"With these settings '{self.id}' preserves nothing, and there is a preserve list: leave it out, set "
                "'preserve_weight' above 0, or use another preset or method."
            )
        if settings.gradient != "sum":
            raise RequestError(
                f"The gradient rule '{settings.gradient}' sets forgetting against keeping, and with these settings "
                f"'{self.id}' preserves nothing: set 'preserve_weight' above 0, or 'gradient' to 'sum'."
            )

    def prompts(
        self, encoder: TextEncoder, request: ForgetRequest, settings: Any
    ) -> tuple[list[TargetPrompt], list[str]]:
        """What is forgotten and what is kept, as prompts: the kind's templates, diverse pairs or the person's own.

        Kept are the empty prompt, every preserved phrase in the templates, and the retain side of the pairs.
        """
        targets: list[TargetPrompt] = []
        kept = [""]
        for concept in request.concepts:
            forget, retain = _said(concept, request, settings)
            kept += retain
            for template, text in forget:
                instead = None
                if concept.instead:
                    instead = (
                        template.format(concept.instead)
                        if template is not None
                        else replace_phrase(text, concept.name, concept.instead)
                    )
                elif self.drops(settings):
                    instead = replace_phrase(text, concept.name, "")
                targets.append(target_prompt(encoder, concept, text, instead, settings.include_end))
        kinds = dict.fromkeys(concept.kind for concept in request.concepts)
        kept += [template.format(p) for p in request.preserve for kind in kinds for template in settings.said(kind)]
        kept = list(dict.fromkeys(kept)) if self.keeps(settings) else []
        for text in kept:
            end_position(encoder, text)
        return targets, kept

    def batches(self, model: LatentDiffusion, request: ForgetRequest, settings: Any, inputs: Inputs) -> BatchSampler:
        """What this request trains on, nothing drawn yet; its generator is the request's seed's."""
        targets, kept = self.prompts(model.text, request, settings)
        earlier = [] if inputs.earlier is None else list(read_history(inputs.earlier.metadata).concepts)
        # the base model still shows them: keeping these prompts as it has them would bring them back
        kept = [text for text in kept if not any(mentions(concept.name, text) for concept in earlier)]
        return BatchSampler(
            model,
            targets,
            kept,
            torch.Generator("cpu").manual_seed(request.seed),
            settings.batch_size,
            GenerationSettings(
                settings.sample_steps, model.guidance if settings.guidance is None else settings.guidance
            ),
            inputs.workspace,
            [template.format(concept.name) for concept in earlier for template in settings.said(concept.kind)],
        )

    def fit(
        self,
        model: LatentDiffusion,
        request: ForgetRequest,
        settings: Any,
        progress: Progress | None = None,
        inputs: Inputs | None = None,
    ) -> Patch:
        """Train the deltas and return them; deterministic under the request's seed on one device.

        With a workspace a training that was cut short goes on where it was.
        """
        inputs = inputs or Inputs()
        self._refuse_without_use(request, settings, inputs)
        self.refuse(request, settings, inputs)
        # what is made here must not be made in a host's inference mode, or it could not take part in a gradient
        with frozen(model.unet):
            batches = self.batches(model, request, settings, inputs)
            self.picture(batches, settings, inputs, progress)
            null_space = self.null_space(model, batches, settings)
            deltas = Deltas(
                model, self.keys(model, settings), settings.rank, batches.generator, inputs.earlier, null_space
            )
            objective = self.objective(batches, deltas, request, settings, inputs, progress)
            checkpoint = None
            if inputs.workspace is not None:
                given = [
                    inputs.images,
                    dataclasses.asdict(settings),
                    request.without_images().to_json(),
                    inputs.earlier_factors(),
                ]
                checkpoint = Checkpoint(inputs.workspace, key_of(VERSION, model.model_hash, given))
            told = train(
                model, deltas, objective, _loop(settings), progress, message=self.message, checkpoint=checkpoint
            )
            factors = deltas.factors(settings.max_rank)
        note = None
        if model.survey.family == "sdxl":
            note = "SDXL also takes the concept in through the pooled text vector, which this edit leaves as it is."
        about = PatchMetadata(
            trained=settings.train, terms={"first": dict(told.first), "last": dict(told.last)}, note=note
        )
        return Patch(factors, about.to_strings())

    def picture(self, batches: BatchSampler, settings: Any, inputs: Inputs, progress: Progress | None) -> None:
        """Fill the pools of the concepts and of what is kept, as ``settings.latents`` says."""
        if settings.latents == "zeros":
            return
        wanted: dict[str, list[str]] = {}
        for prompt in batches.targets:
            if settings.latents == "images":
                continue
            wanted.setdefault(prompt.concept, []).append(prompt.text)
        if batches.kept:  # a kept prompt is shown any of these: it shall stay as it is on other pictures than its own
            order = torch.randperm(len(batches.kept), generator=batches.generator).tolist()
            wanted[RETAIN_POOL] = [batches.kept[i] for i in order]
        batches.draw(wanted, settings.n_images, progress)
        if settings.latents == "images":
            for name in dict.fromkeys(prompt.concept for prompt in batches.targets):
                batches.encode(name, inputs.images[name])


def _loop(settings: Any) -> TrainingSettings:
    names = [field.name for field in dataclasses.fields(TrainingSettings)]
    return TrainingSettings(**{name: getattr(settings, name) for name in names})


def _said(
    concept: Concept, request: ForgetRequest, settings: TrainedSettings
) -> tuple[list[tuple[str | None, str]], list[str]]:
    """The concept's prompts (with the template each comes from, if any) and those that are kept beside them."""
    if settings.diverse:
        others = [other.name for other in request.concepts if other is not concept]
        pairs = prompt_pairs(concept, settings.diverse, request.seed, grammar=settings.grammar, without=others)
        return [(None, pair.forget) for pair in pairs], [pair.retain for pair in pairs]
    if settings.forget_prompts:
        if len(request.concepts) > 1:
            raise RequestError("'forget_prompts' are for one concept; forget several in several requests.")
        given_pairs(settings.forget_prompts, settings.retain_prompts, concept)
        return [(None, text) for text in settings.forget_prompts], list(settings.retain_prompts)
    found = settings.said(concept.kind)
    return [(template, template.format(concept.name)) for template in found], list(settings.retain_prompts)
