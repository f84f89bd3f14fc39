"""Selective Amnesia: training a concept's prompts on surrogate images, with replay and an elastic penalty.

Heng & Soh, *Selective Amnesia: A Continual Learning Approach to Forgetting in Deep Generative Models* (arXiv
2305.10120), equation 8 with its likelihoods written as denoising losses:

``L = E_{q(x|c_f)} ‖ε − ε_θ(x_t, t, c_f)‖² + γ E_{replay} ‖ε − ε_θ(x_t, t, c_r)‖² + λ Σ_i F_i (θ_i − θ*_i)²``

The surrogate distribution ``q`` is the user's choice: images that the model generates for a surrogate prompt, the
user's own images, or uniform noise. Replay uses images that the model generates for the prompts to preserve, each under
its own prompt. ``F`` is the Fisher information of the trained projections (:mod:`~..training.fisher`). ``θ*`` are the
weights that the request starts from; for a LoRA ``θ − θ* = BA``, so the penalty is ``Σ F⊙(BA)²``.

``λ`` does not carry over between models, because ``F`` scales with the loss, the widths and the number of weights. By
default the penalty is ``Σ F (θ − θ*)² / Σ F θ*²``, which is 1 for a change as large as the weights. It is invariant to
the scale of the loss and of a layer's inputs or outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import RequestError
from ..models.autoencoders import encode_images
from ..models.latent_diffusion import LatentDiffusion
from ..models.model_survey import PROJECTIONS
from ..models.text_encoders import TextEncoder
from ..progress import Progress
from ..prompts.everyday import COMMON
from ..request.concept import KINDS, normalized_phrase, templates
from ..request.request import ForgetRequest
from ..request.settings import setting
from ..training.adapters import Deltas
from ..training.batches import BatchSampler, TargetPrompt
from ..training.fisher import FisherSettings, fisher_information
from ..training.loop import Term, Terms
from ..training.losses import elastic_penalty, relative_fisher, replay_matching, surrogate_matching
from .base import Inputs
from .registry import register
from .trained import BaseObjective, TrainedMethod
from .trained_settings import NoReplacement, TrainedSettings

__all__ = [
    "SelectiveAmnesia",
    "SelectiveAmnesiaObjective",
    "SelectiveAmnesiaSettings",
    "fisher_measurement",
    "fisher_prompts",
]


@dataclass(frozen=True)
class SelectiveAmnesiaSettings(TrainedSettings):
    """Settings of :class:`SelectiveAmnesia`, in addition to those of every trained method.

    ``preserve_weight`` is ``γ`` and ``ewc_weight`` is ``λ``. The default ``fisher_prompts`` do not depend on the
    request, so one file of Fisher information serves every request on a model.
    """

    surrogate: Literal["prompt", "images", "noise"] = setting(
        "prompt",
        "What a concept turns into. prompt: the model's images of the replacement, or of the prompt without the "
        "concept. images: those given for the concept. noise: uniform noise.",
    )
    preserve_weight: float = setting(
        1.0, "Weight of the replayed images.", minimum=0, maximum=1000, step=0.1, group="weights"
    )
    replay_images: int = setting(
        64, "Images of preserved concepts that are replayed.", minimum=1, maximum=10000, quick=1
    )
    keep_common: bool = setting(
        False, "Also preserve everyday words, in addition to the preserve list.", group="prompts"
    )
    ewc_weight: float = setting(
        1.0,
        "Weight of the elastic penalty, which holds weights that matter to other prompts.",
        minimum=0,
        maximum=1e6,
        step=0.1,
    )
    ewc_scale: Literal["relative", "published"] = setting(
        "relative",
        "Unit of ewc_weight. relative: to the size of the weights. published: the plain sum over all weights.",
        advanced=True,
    )
    fisher: Literal["exact", "halves", "pairs"] = setting(
        "pairs",
        "Estimator of the Fisher information. exact: over all time steps. halves, pairs: over random ones.",
        advanced=True,
        group="Fisher information",
    )
    fisher_samples: int = setting(
        96,
        "Images that the Fisher information is measured on.",
        minimum=1,
        maximum=100000,
        group="Fisher information",
        quick=1,
    )
    fisher_draws: int = setting(
        4,
        "Random time steps of each half of an image's estimate.",
        minimum=1,
        maximum=1000,
        advanced=True,
        group="Fisher information",
        quick=1,
    )
    fisher_prompts: tuple[str, ...] = setting(
        (),
        "Prompts that the Fisher information is measured on, one per line; empty: everyday words.",
        advanced=True,
        group="Fisher information",
    )

    no_replacement: Literal["dropped", "mean", "farthest"] = setting(
        "dropped",
        "What the images of a concept without a replacement show. dropped: the same prompt without it. mean: the same "
        "prompts with four preserved phrases, or everyday words of its kind, that are farthest from it, in turn. "
        "farthest: with the farthest of them alone.",
        group="prompts",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latents != "generated":
            raise RequestError(
                "Selective Amnesia trains on images that the model generates, so 'latents' must be 'generated': choose "
                "the images in a concept's place with 'surrogate'."
            )
        if self.contexts and self.templates is not None:
            raise RequestError("With your own 'templates', 'contexts' has no effect: leave one of the two out.")
        if self.include_end:
            raise RequestError("Selective Amnesia does not use token positions: leave 'include_end' out.")


def fisher_prompts() -> list[str]:
    """The default prompts of Fisher information: the empty one, and every everyday word in one template."""
    prompts = [[templates(kind)[0].format(word) for word in COMMON[kind]] for kind in KINDS]
    # interleave the kinds, so that a few samples cover all of them
    order = sorted((i / len(group), k, text) for k, group in enumerate(prompts) for i, text in enumerate(group))
    return ["", *dict.fromkeys(text for _, _, text in order)]


def fisher_measurement(settings: SelectiveAmnesiaSettings) -> tuple[list[str], FisherSettings]:
    """The prompts that Fisher information is measured on under these settings, and how it is measured."""
    return list(settings.fisher_prompts) or fisher_prompts(), FisherSettings(
        settings.fisher,
        settings.fisher_samples,
        draws=settings.fisher_draws,
        sample_steps=settings.sample_steps,
        guidance=settings.guidance,
    )


# the authors': AdamW 1e-5, batches of 4 (on each of 4 GPUs), γ = 1, λ = 50, the concept's name as prompt, dense
# weights. Different: only attn2 instead of the whole UNet; 48 images and 600 steps instead of 1,000 images and
# 200 epochs; an unbiased estimate instead of the exact Fisher information of 5,000 images
_PUBLISHED = SelectiveAmnesiaSettings(
    steps=600,
    lr=1e-5,
    train=PROJECTIONS,
    rank=None,
    pooled=False,
    templates=("{}",),
    n_images=48,
    replay_images=48,
    guidance=7.5,
    ewc_weight=50.0,
    ewc_scale="published",
    earlier_weight=0.0,
)


@register
class SelectiveAmnesia(TrainedMethod):
    """Surrogate, replay and elastic penalty; takes minutes. Fisher information is measured once per model."""

    id = "selective_amnesia"
    title = "Selective Amnesia (surrogate, replay, elastic weights)"
    paper = "https://arxiv.org/abs/2305.10120"
    message = "learning the surrogate"
    Settings = SelectiveAmnesiaSettings
    main = ("steps", "lr", "rank", "surrogate", "replay_images", "ewc_weight", "fisher_samples")
    presets = {
        "published": _PUBLISHED,
        # benchmarks/learning_rates.py chose the factor
        "published_scaled": dataclasses.replace(_PUBLISHED, lr=1000 * _PUBLISHED.lr),
        "tuned": SelectiveAmnesiaSettings(
            steps=120,
            lr=1e-3,
            batch_size=8,
            train=("to_k", "to_v"),
            contexts=True,
            n_images=24,
            replay_images=48,
            sample_steps=16,
            keep_common=True,
            ewc_weight=0.3,
            no_replacement="mean",
        ),
    }

    def no_replacement(self, settings: SelectiveAmnesiaSettings) -> NoReplacement | None:
        return settings.no_replacement

    def uses_images(self, settings: SelectiveAmnesiaSettings) -> bool:
        return settings.surrogate == "images"

    def _check_inputs(self, request: ForgetRequest, settings: SelectiveAmnesiaSettings, inputs: Inputs) -> None:
        if inputs.images and settings.surrogate != "images":
            raise RequestError(
                f"There are images of '{next(iter(inputs.images))}', which Selective Amnesia does not use with these "
                "settings: leave them out, or set 'surrogate' to 'images' if they show what replaces it."
            )
        super()._check_inputs(request, settings, inputs)

    def check_request(self, request: ForgetRequest, settings: SelectiveAmnesiaSettings, inputs: Inputs) -> None:
        if settings.surrogate == "prompt":
            return
        replaced = [concept.name for concept in request.concepts if concept.replacement_text]
        if replaced:
            raise RequestError(
                f"With 'surrogate' set to '{settings.surrogate}' a replacement is not used, and '{replaced[0]}' "
                "has one: leave it out, or set 'surrogate' to 'prompt'."
            )
        missing = [concept.name for concept in request.concepts if concept.name not in inputs.images]
        if settings.surrogate == "images" and missing:
            raise RequestError(
                f"'surrogate' is 'images', and there are no images for '{missing[0]}': give some that show what "
                "replaces it, or set 'surrogate' to 'prompt' or 'noise'."
            )

    def prompts(
        self, encoder: TextEncoder, request: ForgetRequest, settings: SelectiveAmnesiaSettings
    ) -> tuple[list[TargetPrompt], list[str]]:
        """As for every trained method; every target has the prompt of its surrogate."""
        for concept in request.concepts:
            _check_replacement(encoder, concept.name, concept.replacement_text)
        targets, retain = super().prompts(encoder, request, settings)
        names = [concept.name for concept in request.concepts]
        # a context that mentions another concept would teach that one again
        targets = [
            target
            for target in targets
            if not any(_contains(target.text, name) and not _contains(target.concept, name) for name in names)
        ]
        explicit = (*request.preserve, *settings.retain_prompts)
        excluded = [name for name in names if not any(_contains(phrase, name) for phrase in explicit)]
        if settings.keep_common and retain:
            retain += fisher_prompts()
        retain = [text for text in retain if not any(_contains(text, name) for name in excluded)]
        return targets, list(dict.fromkeys(retain))

    def fill_pools(
        self, batches: BatchSampler, settings: SelectiveAmnesiaSettings, inputs: Inputs, progress: Progress | None
    ) -> None:
        """Fill the surrogate pools and the replay pools.

        There is one surrogate pool per target prompt (``"prompt"``) or per concept (``"images"``, ``"noise"``), and one
        replay pool per prompt to preserve.
        """
        model, generator = batches.model, batches.generator
        by_concept: dict[str, list[TargetPrompt]] = {}
        for target in batches.targets:
            by_concept.setdefault(target.concept, []).append(target)
        for name, targets in by_concept.items():
            if settings.surrogate == "prompt":
                surrogates = {target.text: [target.replacement_text or ""] for target in targets}
                batches.draw(surrogates, -(-settings.n_images // len(targets)), progress)
            elif settings.surrogate == "images":
                batches.encode(name, inputs.images[name], progress)
            else:
                batches.pools[name] = _uniform_noise(model, settings.n_images, generator, progress)
        if batches.retain:
            order = torch.randperm(len(batches.retain) - 1, generator=generator).tolist()
            shuffled, common = [batches.retain[1 + i] for i in order], set(fisher_prompts())
            # the user's own prompts first (the sort is stable)
            shuffled.sort(key=lambda text: text in common)
            batches.retain = [batches.retain[0], *shuffled[: settings.replay_images - 1]]
            batches.draw(
                {text: [text] for text in batches.retain}, settings.replay_images // len(batches.retain), progress
            )

    def objective(
        self,
        batches: BatchSampler,
        deltas: Deltas,
        request: ForgetRequest,
        settings: SelectiveAmnesiaSettings,
        inputs: Inputs,
        progress: Progress | None,
    ) -> SelectiveAmnesiaObjective:
        model = batches.model
        weights: dict[str, Tensor] = {}
        if settings.ewc_weight:
            prompts, measurement = fisher_measurement(settings)
            found = fisher_information(
                model, deltas.keys, prompts, measurement, workspace=inputs.workspace, progress=progress
            )
            weights = scaled_fisher(model, found.values, settings.ewc_scale)
        return SelectiveAmnesiaObjective(batches, deltas, settings, weights)


def scaled_fisher(
    model: LatentDiffusion, fisher: Mapping[str, Tensor], scale: Literal["relative", "published"]
) -> dict[str, Tensor]:
    """Fisher information in the unit of ``λ``, on the weights' devices.

    Args:
        model: The base model.
        fisher: By canonical key ``F``, ``(d_out, d_in)``.
        scale: ``"relative"``: divided by ``Σ F θ*²``. ``"published"``: times ``T²``, a sum over time steps.
    """
    weights = {key: model.survey.linear(key).weight.detach() for key in fisher}
    found = {key: value.to(weights[key].device) for key, value in fisher.items()}
    if scale == "published":
        return {key: value * float(model.train_steps) ** 2 for key, value in found.items()}
    return relative_fisher(found, weights)


class SelectiveAmnesiaObjective(BaseObjective):
    """Computes the three terms of a step: ``surrogate`` to forget, ``replay`` and ``elastic`` to retain.

    Args:
        batches: Training batches.
        deltas: The trained deltas.
        settings: The method's settings.
        fisher: Fisher information by key, from :func:`scaled_fisher`; empty: no penalty.
    """

    def __init__(
        self,
        batches: BatchSampler,
        deltas: Deltas,
        settings: SelectiveAmnesiaSettings,
        fisher: Mapping[str, Tensor],
    ) -> None:
        super().__init__(batches, deltas)
        self.settings, self.fisher = settings, dict(fisher)

    def __call__(self, step: int) -> Terms:
        s = self.settings
        targets = self.batches.next_targets()
        pools = [target.text if s.surrogate == "prompt" else target.concept for target in targets]
        terms = {"surrogate": Term(surrogate_matching(*self._denoised(pools, [target.text for target in targets])))}
        if self.batches.retain:
            texts = self.batches.next_retain()
            terms["replay"] = Term(replay_matching(*self._denoised(texts, texts)), s.preserve_weight, "retain")
        if self.fisher:
            terms["elastic"] = Term(elastic_penalty(self.deltas.changes(), self.fisher), s.ewc_weight, "retain")
        return terms | self.preserve_earlier(s.earlier_weight, s.batch_size)

    def _denoised(self, pools: Sequence[str], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The predicted and the true noise of a batch from these pools under these prompts."""
        batch = self.batches.noised(pools)
        return self.predicted(batch.x, batch.times, texts), batch.noise


def _uniform_noise(
    model: LatentDiffusion, count: int, generator: torch.Generator, progress: Progress | None = None
) -> Tensor:
    """Latents of images of uniform noise; without an autoencoder, uniform latents of variance 1."""
    if model.vae is None:
        uniform = torch.rand(count, *model.latent_shape, generator=generator)
        return ((2 * uniform - 1) * 3**0.5).to(model.device)
    height, width = (8 * side for side in model.latent_shape[1:])
    uniform = torch.rand(count, 3, height, width, generator=generator)
    return encode_images(model.vae, 2 * uniform - 1, progress).to(model.device)


def _contains(text: str, phrase: str) -> bool:
    return normalized_phrase(phrase) in normalized_phrase(text)


def _check_replacement(encoder: TextEncoder, name: str, replacement: str) -> None:
    """Raise if the replacement contains the concept."""
    concept, ids = list(encoder.phrase_ids(name)), list(encoder.phrase_ids(replacement)) if replacement else []
    if any(ids[i : i + len(concept)] == concept for i in range(len(ids) - len(concept) + 1)):
        raise RequestError(
            f"The replacement '{replacement}' contains the concept '{name}' itself, so its images would show what is "
            "to be forgotten: name another replacement."
        )
