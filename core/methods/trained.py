"""Base class of the trained methods: common settings, prompts, images, and the call of the training loop.

A method defines the terms of its loss (:meth:`TrainedMethod.objective`). Everything else is here, so every trained
method takes the same inputs, can be cancelled and resumed, and returns a patch of bounded rank.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ModelError, RequestError
from ..files.workspace import key_of
from ..models.latent_diffusion import LatentDiffusion
from ..models.model_survey import ModelSurvey
from ..models.text_encoders import TextEncoder
from ..models.text_entries import POOLED
from ..models.token_positions import end_position
from ..patch.history import read_history
from ..patch.metadata import PatchMetadata
from ..patch.patch import Patch
from ..progress import Progress
from ..prompts.pairs import given_pairs, mentions, prompt_pairs
from ..prompts.phrases import replace_phrase
from ..request.concept import Concept
from ..request.plan import Plan
from ..request.request import ForgetRequest
from ..training.adapters import Deltas
from ..training.batches import RETAIN_POOL, BatchSampler, GenerationSettings, TargetPrompt, target_prompt
from ..training.frozen import frozen
from ..training.loop import Checkpoint, Objective, Term, Terms, TrainingSettings, train
from ..training.losses import noise_matching
from ..version import VERSION
from .base import POOLED_LEFT, Inputs, Method
from .mean_phrases import MEAN_OF, mean_note, mean_phrases
from .trained_settings import NoReplacement, TrainedSettings

__all__ = ["BaseObjective", "TrainedMethod"]


class BaseObjective:
    """Common base of the objectives: training batches, noise predictions, and the terms that preserve."""

    def __init__(self, batches: BatchSampler, deltas: Deltas) -> None:
        self.batches, self.deltas, self.model = batches, deltas, batches.model

    def predicted(self, x: Tensor, times: Tensor, texts: Sequence[str]) -> Tensor:
        """``ε_θ(x_t, t, c)`` of the model with the deltas, ``(n, 4, h, w)``.

        Args:
            x: Noised latents, ``(n, 4, h, w)``.
            times: Their time steps, ``(n,)``.
            texts: One prompt per row.
        """
        return self.model.predict_noise(x, times, self.batches.states(texts))

    def base(self, x: Tensor, times: Tensor, texts: Sequence[str]) -> Tensor:
        """:meth:`predicted` of the base model, without gradient."""
        with torch.no_grad(), self.deltas.using("base"):
            return self.predicted(x, times, texts)

    def preserve(self, weight: float, texts: Sequence[str] | None = None) -> Term:
        """Match the base model's predictions for the retain set, on images of the retain set.

        The base model is the reference for every request of a sequence, so drift does not accumulate.

        Args:
            weight: Weight of the term.
            texts: The prompts; ``None``: the next ones of the retain set.
        """
        texts = self.batches.next_retain() if texts is None else texts
        batch = self.batches.noised([RETAIN_POOL] * len(texts))
        predicted = self.predicted(batch.x, batch.times, texts)
        return Term(noise_matching(predicted, self.base(batch.x, batch.times, texts)), weight, "retain")

    def preserve_earlier(self, weight: float, count: int) -> dict[str, Term]:
        """Match the predictions that earlier requests left, for the prompts of what they forgot.

        Without this term, preserving the base model's predictions would undo the earlier requests.

        Args:
            weight: Weight of the term.
            count: Prompts per batch.

        Returns:
            The term by its name; empty if there is no earlier request.
        """
        if not weight or not self.batches.earlier:
            return {}
        texts = self.batches.next_earlier(count)
        return {"earlier": Term(self._earlier_loss(texts), weight, "retain")}

    def _earlier_loss(self, texts: Sequence[str]) -> Tensor:
        batch = self.batches.noised([self.retain_pool()] * len(texts))
        with torch.no_grad(), self.deltas.using("earlier"):
            target = self.predicted(batch.x, batch.times, texts)
        return noise_matching(self.predicted(batch.x, batch.times, texts), target)

    def retain_pool(self) -> str:
        """Name of the pool of the retain set; of any other pool if there is none."""
        pools = self.batches.pools
        return RETAIN_POOL if RETAIN_POOL in pools or not pools else next(iter(pools))

    def __call__(self, step: int) -> Terms:
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        return self.batches.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.batches.restore(state)


class TrainedMethod(Method):
    """A method that trains deltas of the model's projections; its ``Settings`` extends :class:`TrainedSettings`."""

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
        """Build the objective; it may generate further images. The model is frozen."""

    def check_request(self, request: ForgetRequest, settings: Any, inputs: Inputs) -> None:
        """Check a request before any work.

        Raises:
            RequestError: The method would ignore a part of the request, or cannot do it.
        """

    def keys(self, model: LatentDiffusion, settings: Any) -> list[str]:
        """Canonical keys of the projections to train, without the layer that reads the pooled vector."""
        return model.survey.trained_keys(settings.train)

    def trains_pooled(self, settings: Any) -> bool:
        """Whether the layer that reads the pooled vector is trained where the model has one."""
        return bool(settings.pooled)

    def reads_attention(self, settings: Any) -> str | None:
        """What in these settings needs a UNet's cross-attention, as the subject of a sentence; ``None``: nothing."""
        return None

    def null_space(self, model: LatentDiffusion, batches: BatchSampler, settings: Any) -> Mapping[str, Tensor] | None:
        """By key the input directions that the deltas must not react to, as for :class:`Deltas`; ``None``: none."""
        return None

    def no_replacement(self, settings: Any) -> NoReplacement | None:
        """What a concept without a replacement is mapped to; ``None``: nothing that the prompts say."""
        return None

    def _means(self, encoder: TextEncoder, request: ForgetRequest, settings: Any) -> dict[str, tuple[str, ...]]:
        """The phrases of :func:`mean_phrases`, of the concepts that the settings map to a mean."""
        count = {"mean": MEAN_OF, "farthest": 1}.get(self.no_replacement(settings) or "", 0)
        alone = [concept.name for concept in request.concepts if not concept.replacement_text]
        return mean_phrases(encoder, request, alone, count=count) if count else {}

    def preserves(self, settings: Any) -> bool:
        """Whether these settings preserve anything."""
        return bool(settings.preserve_weight > 0)

    def uses_images(self, settings: Any) -> bool:
        """Whether these settings use the user's reference images."""
        return bool(settings.latents == "images")

    def _check_inputs(self, request: ForgetRequest, settings: Any, inputs: Inputs) -> None:
        """Check that images and preserve list are used, and that the images needed are there."""
        missing = [concept.name for concept in request.concepts if concept.name not in inputs.images]
        if settings.latents == "images" and missing:
            raise RequestError(
                f"'latents' is 'images', and there are no images of '{missing[0]}': give some, or set it to "
                "'generated'."
            )
        if inputs.images and not self.uses_images(settings):
            raise RequestError(
                f"There are images of '{next(iter(inputs.images))}', which '{self.id}' does not use with these "
                "settings: leave them out, or set 'latents' to 'images'."
            )
        if self.preserves(settings):
            return
        if request.preserve or settings.retain_prompts:
            raise RequestError(
                f"With these settings '{self.id}' preserves nothing, and there is a preserve list: leave it out, set "
                "'preserve_weight' above 0, or use another preset or method."
            )
        if settings.gradient != "sum":
            raise RequestError(
                f"The gradient rule '{settings.gradient}' balances forgetting and preserving, and with these settings "
                f"'{self.id}' preserves nothing: set 'preserve_weight' above 0, or 'gradient' to 'sum'."
            )

    def prompts(
        self, encoder: TextEncoder, request: ForgetRequest, settings: Any
    ) -> tuple[list[TargetPrompt], list[str]]:
        """The prompts to forget and to preserve: from templates, varied pairs, or the user's own.

        The prompts to preserve are the empty one, every preserved phrase in the templates, and the retain side of the
        pairs.

        Raises:
            RequestError: The user's own prompts do not fit the request.
            TokenError: A prompt is cut off, or does not contain the concept.
        """
        targets: list[TargetPrompt] = []
        retain = [""]
        without, means = self.no_replacement(settings), self._means(encoder, request, settings)
        for concept in request.concepts:
            forget, paired = _concept_prompts(concept, request, settings)
            retain += paired
            # in turn: the squared error of all of them is least at their mean
            phrases = means.get(concept.name, (concept.replacement_text or "",))
            for i, (template, text) in enumerate(forget):
                phrase, replaced = phrases[i % len(phrases)], None
                if phrase and template is not None:
                    replaced = template.format(phrase)
                elif phrase or without is not None:
                    replaced = replace_phrase(text, concept.name, phrase)
                targets.append(target_prompt(encoder, concept, text, replaced, settings.include_end))
        kinds = dict.fromkeys(concept.kind for concept in request.concepts)
        retain += [
            template.format(phrase)
            for phrase in request.preserve
            for kind in kinds
            for template in settings.prompt_templates(kind)
        ]
        retain = list(dict.fromkeys(retain)) if self.preserves(settings) else []
        for text in retain:
            end_position(encoder, text)  # raises if the prompt is cut off
        return targets, retain

    def other_prompts(self, targets: Sequence[TargetPrompt], settings: Any) -> list[str]:
        """Prompts that the objective reads besides targets, replacements and retain set.

        All fixed prompts are encoded before the first step, so the objective can read only these.
        """
        return []

    def batches(
        self,
        model: LatentDiffusion,
        request: ForgetRequest,
        settings: Any,
        inputs: Inputs,
        progress: Progress | None = None,
    ) -> BatchSampler:
        """The batch sampler of a request, seeded by it; its pools are still empty."""
        targets, retain = self.prompts(model.text, request, settings)
        earlier = [] if inputs.earlier is None else list(read_history(inputs.earlier.metadata).concepts)
        # preserving the base model's predictions for prompts with forgotten concepts would bring these back
        retain = [text for text in retain if not any(mentions(concept.name, text) for concept in earlier)]
        return BatchSampler(
            model,
            targets,
            retain,
            torch.Generator("cpu").manual_seed(request.seed),
            settings.batch_size,
            GenerationSettings(
                settings.sample_steps, model.guidance if settings.guidance is None else settings.guidance
            ),
            inputs.workspace,
            [
                template.format(concept.name)
                for concept in earlier
                for template in settings.prompt_templates(concept.kind)
            ],
            self.other_prompts(targets, settings),
            progress,
        )

    def fit(
        self,
        model: LatentDiffusion,
        plan: Plan,
        progress: Progress | None = None,
        inputs: Inputs | None = None,
    ) -> Patch:
        """Train the deltas; deterministic under the request's seed on one device.

        With a workspace in ``inputs``, an interrupted training is resumed.
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
        self._check_inputs(request, settings, inputs)
        self.check_request(request, settings, inputs)
        self._check_model(model, settings)
        means = mean_note(self._means(model.text, request, settings))
        # tensors made in a host's inference mode could not take part in autograd
        with frozen(model.unet):
            batches = self.batches(model, request, settings, inputs, progress)
            self.fill_pools(batches, settings, inputs, progress)
            keys, null_space = self.keys(model, settings), dict(self.null_space(model, batches, settings) or {})
            if self.trains_pooled(settings):
                pooled = _beside_pooled(model.survey)
                keys, null_space = [*keys, *pooled], null_space | {k: v for k, v in pooled.items() if v.numel()}
            deltas = Deltas(model, keys, settings.rank, batches.generator, inputs.earlier, null_space)
            objective = self.objective(batches, deltas, request, settings, inputs, progress)
            checkpoint = None
            if inputs.workspace is not None:
                dependencies = [
                    [model.text_layer, list(model.latent_shape), model.prediction_type, model.guidance],
                    inputs.images,
                    dataclasses.asdict(settings),
                    request.without_images().to_json(),
                    inputs.earlier_factors(),
                ]
                checkpoint = Checkpoint(inputs.workspace, key_of(VERSION, model.model_hash, dependencies))
            report = train(
                model, deltas, objective, _loop(settings), progress, message=self.message, checkpoint=checkpoint
            )
            factors = deltas.factors(settings.max_rank)
        left = any(entry.stream == POOLED and entry.key not in factors for entry in model.survey.entries)
        notes = [POOLED_LEFT if left else None, means]
        about = PatchMetadata(
            trained=settings.train,
            terms={"first": dict(report.first), "last": dict(report.last)},
            note=" ".join(filter(None, notes)) or None,
        )
        return Patch(factors, about.to_strings())

    def _check_model(self, model: LatentDiffusion, settings: Any) -> None:
        found = model.survey
        if not self.keys(model, settings):
            raise ModelError(
                f"The method '{self.id}' trains layers of the model's blocks, and those of a model of the family "
                f"{found.family} are not known, or not within reach, here: choose the method 'uce'."
            )
        if not found.sites and (what := self.reads_attention(settings)) is not None:
            raise ModelError(
                f"{what} the cross-attention of a UNet, and a model of the family {found.family} has none."
            )

    def fill_pools(self, batches: BatchSampler, settings: Any, inputs: Inputs, progress: Progress | None) -> None:
        """Fill the pools of the concepts and of the retain set, as ``settings.latents`` says."""
        if settings.latents == "zeros":
            return
        prompts: dict[str, list[str]] = {}
        for prompt in batches.targets:
            if settings.latents == "images":
                continue
            prompts.setdefault(prompt.concept, []).append(prompt.text)
        if batches.retain:  # one pool for all of them: predictions are also preserved on images of other prompts
            order = torch.randperm(len(batches.retain), generator=batches.generator).tolist()
            prompts[RETAIN_POOL] = [batches.retain[i] for i in order]
        batches.draw(prompts, settings.n_images, progress)
        if settings.latents == "images":
            for name in dict.fromkeys(prompt.concept for prompt in batches.targets):
                batches.encode(name, inputs.images[name], progress)


def _beside_pooled(survey: ModelSurvey) -> dict[str, Tensor]:
    """By key of the layers that read the pooled vector, their inputs beside it as columns ``(d_in, n)``.

    SDXL's also reads the sizes of the picture, and what is forgotten must not depend on them.
    """
    found = {}
    for entry in survey.entries:
        if entry.stream == POOLED:
            inputs = torch.eye(entry.module.in_features)
            found[entry.key] = torch.cat([inputs[:, : entry.start], inputs[:, entry.start + entry.width :]], 1)
    return found


def _loop(settings: Any) -> TrainingSettings:
    names = [field.name for field in dataclasses.fields(TrainingSettings)]
    return TrainingSettings(**{name: getattr(settings, name) for name in names})


def _concept_prompts(
    concept: Concept, request: ForgetRequest, settings: TrainedSettings
) -> tuple[list[tuple[str | None, str]], list[str]]:
    """The prompts of a concept, each with the template it comes from, if any, and the prompts to preserve with them."""
    if settings.diverse:
        others = [other.name for other in request.concepts if other is not concept]
        pairs = prompt_pairs(concept, settings.diverse, request.seed, grammar=settings.grammar, without=others)
        return [(None, pair.forget) for pair in pairs], [pair.retain for pair in pairs]
    if settings.forget_prompts:
        if len(request.concepts) > 1:
            raise RequestError("'forget_prompts' are for one concept: forget several concepts in separate requests.")
        given_pairs(settings.forget_prompts, settings.retain_prompts, concept)
        return [(None, text) for text in settings.forget_prompts], list(settings.retain_prompts)
    found = settings.prompt_templates(concept.kind)
    return [(template, template.format(concept.name)) for template in found], list(settings.retain_prompts)
