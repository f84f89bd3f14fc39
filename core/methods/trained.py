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
from ..request.plan import Plan
from ..request.request import ForgetRequest
from ..request.settings import check_settings, setting
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
    """Settings that all trained methods share."""

    steps: int = setting(35, "Training steps.", minimum=1, maximum=100000, leading=True, group="training", quick=2)
    lr: float = setting(2e-4, "Learning rate.", minimum=1e-7, maximum=1, step=1e-7, leading=True, group="training")
    weight_decay: float = setting(
        0.01,
        "Weight decay of the trained change, which pulls it towards the unchanged model.",
        minimum=0,
        maximum=10,
        step=0.001,
        advanced=True,
        group="training",
    )
    batch_size: int = setting(
        4, "Images per training step. More need more memory.", minimum=1, maximum=256, group="training"
    )
    clip_norm: float | None = setting(
        None,
        "Maximum norm of the gradient; 0: not clipped.",
        minimum=1e-6,
        maximum=1000,
        step=0.1,
        none_value=0,
        advanced=True,
        group="training",
    )
    optimiser: Literal["adamw", "sgd"] = setting(
        "adamw", "Optimizer that turns gradients into steps.", advanced=True, group="training"
    )
    gradient: Literal["sum", "restricted", "restricted_step"] = setting(
        "sum",
        "How the gradients of forgetting and of preserving are combined. sum: added up. restricted: neither may undo "
        "the other. restricted_step: the optimizer's actual update may not either, and is halved where it would.",
        group="training",
    )
    alpha: float = setting(
        1.0,
        "With a restricted gradient: the weight of forgetting against preserving.",
        minimum=0.001,
        maximum=1000,
        step=0.05,
        advanced=True,
        group="training",
    )
    train: tuple[str, ...] = setting(
        ("to_q", "to_k"),
        "Projections of every cross-attention layer that are trained.",
        choices=PROJECTIONS,
        group="training",
    )
    rank: int | None = setting(
        8,
        "Rank of the trained LoRA; 0: full matrices, which need far more memory.",
        minimum=1,
        maximum=1024,
        none_value=0,
        leading=True,
        group="training",
    )
    max_rank: int | None = setting(
        None,
        "Maximum rank of the finished patch; 0: no limit.",
        minimum=1,
        maximum=4096,
        none_value=0,
        advanced=True,
        group="training",
    )
    latents: Literal["zeros", "generated", "images"] = setting(
        "generated",
        "Images to train on. generated: drawn by the model itself. images: your reference images. zeros: none.",
        group="images",
    )
    n_images: int = setting(
        8, "Images that the model draws of each concept.", minimum=1, maximum=1000, group="images", quick=1
    )
    sample_steps: int = setting(
        16, "Sampling steps of the images that the model draws.", minimum=1, maximum=1000, group="images", quick=1
    )
    guidance: float | None = setting(
        None,
        "Guidance of the images that the model draws; 0: the model's usual one.",
        minimum=0,
        maximum=100,
        step=0.1,
        none_value=0,
        advanced=True,
        group="images",
    )
    templates: tuple[str, ...] | None = setting(
        None,
        "Prompts with {} in the concept's place, one per line; empty: those of the concept's kind.",
        advanced=True,
        group="prompts",
    )
    one_template: bool = setting(False, "Use only the first template.", advanced=True, group="prompts")
    contexts: bool = setting(
        False,
        "Also use the concept in everyday contexts, next to colours, styles and backgrounds.",
        group="prompts",
    )
    diverse: int = setting(
        0,
        "Number of varied prompts per concept, in place of the templates; 0: use the templates. Each is paired with a "
        "prompt to preserve, the same without the concept.",
        minimum=0,
        maximum=10000,
        group="prompts",
    )
    grammar: Literal["general", "embedded"] = setting(
        "general",
        "Vocabulary of the varied prompts: general, or that of the embedded model.",
        advanced=True,
        group="prompts",
    )
    forget_prompts: tuple[str, ...] = setting(
        (),
        "Your own prompts to forget, one per line. Each must contain the concept.",
        advanced=True,
        group="prompts",
    )
    retain_prompts: tuple[str, ...] = setting(
        (), "Your own prompts to preserve, one per line.", advanced=True, group="prompts"
    )
    # the first end-of-text token only, never the padding, which has the same id in SD1
    include_end: bool = setting(
        False, "Treat the end-of-text token as part of the concept.", advanced=True, group="prompts"
    )
    preserve_weight: float = setting(
        1.0,
        "Weight of preserving the base model's predictions for the preserved prompts.",
        minimum=0,
        maximum=1000,
        step=0.1,
        group="weights",
    )
    earlier_weight: float = setting(
        1.0,
        "Weight of keeping forgotten what earlier requests of a sequence forgot.",
        minimum=0,
        maximum=1000,
        step=0.1,
        group="weights",
    )

    def __post_init__(self) -> None:
        check_settings(self)
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
                if concept.replacement_text:
                    instead = (
                        template.format(concept.replacement_text)
                        if template is not None
                        else replace_phrase(text, concept.name, concept.replacement_text)
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

    def other_prompts(self, targets: Sequence[TargetPrompt], settings: Any) -> list[str]:
        """Prompts that the objective reads beside the targets, their replacements, what is kept and the empty one.

        They are encoded with all others before the first step; a prompt that is not named cannot be read later.
        """
        return []

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
            self.other_prompts(targets, settings),
        )

    def fit(
        self,
        model: LatentDiffusion,
        plan: Plan,
        progress: Progress | None = None,
        inputs: Inputs | None = None,
    ) -> Patch:
        """Train the deltas and return them; deterministic under the request's seed on one device.

        With a workspace, an interrupted training continues where it was.
        """
        return self.train_patch(model, plan.request, plan.settings, progress, inputs or Inputs())

    def train_patch(
        self,
        model: LatentDiffusion,
        request: ForgetRequest,
        settings: Any,
        progress: Progress | None,
        inputs: Inputs,
    ) -> Patch:
        """Train on a checked request with its resolved settings; see :meth:`fit`."""
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
                    [model.text_layer, list(model.latent_shape), model.prediction_type, model.guidance],
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
