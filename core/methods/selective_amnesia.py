"""Selective Amnesia: a concept's prompts are taught pictures of something else, and what matters elsewhere is held.

Heng & Soh, *Selective Amnesia: A Continual Learning Approach to Forgetting in Deep Generative Models* (arXiv
2305.10120), equation 8 with its likelihoods written as denoising losses:

``L = E_{q(x|c_f)} ‖ε − ε_θ(x_t, t, c_f)‖² + γ E_{replay} ‖ε − ε_θ(x_t, t, c_r)‖² + λ Σ_i F_i (θ_i − θ*_i)²``

``q`` is the user's choice, which makes the forgetting controllable: pictures the model draws of a surrogate prompt, the
user's own, or uniform noise. Replayed are the model's own pictures of what is kept, each under its own prompt. ``F`` is
the Fisher information of the trained projections (:mod:`..fisher`); on a LoRA ``θ − θ* = BA``, so that the penalty is
``Σ F⊙(BA)²``. ``θ*`` is where this request starts from.

``λ`` does not carry over between models, since ``F`` grows and falls with the loss, the widths and the number of
weights. By default the penalty is ``Σ F (θ − θ*)² / Σ F θ*²``: 1 for a change as large as the weights themselves, where
``F`` says that they matter. That number stays when the loss, or a layer's input or output, is scaled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import RequestError
from ..models.latent_diffusion import LatentDiffusion
from ..models.text_encoders import TextEncoder
from ..models.unet import PROJECTIONS
from ..progress import Progress
from ..prompts.everyday import COMMON
from ..prompts.phrases import replace_phrase
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
from .trained import BaseObjective, TrainedMethod, TrainedSettings

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

    ``preserve_weight`` is ``γ``, ``ewc_weight`` ``λ``. The default ``fisher_prompts`` do not depend on the request, so
    that one file of Fisher information serves every request on a model.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latents != "generated":
            raise RequestError(
                "Selective Amnesia replays pictures that the model makes, so 'latents' must be 'generated': which "
                "pictures come in a concept's place is the setting 'surrogate'."
            )
        if self.contexts and self.templates is not None:
            raise RequestError("With 'templates' of your own 'contexts' has no use: leave one of the two out.")
        if self.include_end:
            raise RequestError("Selective Amnesia looks at no single tokens: leave 'include_end' out.")


def fisher_prompts() -> list[str]:
    """What Fisher information is measured on by default: the empty prompt and every everyday word, each said once."""
    words = [[templates(kind)[0].format(word) for word in COMMON[kind]] for kind in KINDS]
    # the kinds mixed, so that few samples see all of them
    places = sorted((i / len(group), k, text) for k, group in enumerate(words) for i, text in enumerate(group))
    return ["", *dict.fromkeys(text for _, _, text in places)]


def fisher_measurement(settings: SelectiveAmnesiaSettings) -> tuple[list[str], FisherSettings]:
    """The prompts and settings of the Fisher measurement that a request with these settings needs."""
    return list(settings.fisher_prompts) or fisher_prompts(), FisherSettings(
        settings.fisher,
        settings.fisher_samples,
        draws=settings.fisher_draws,
        sample_steps=settings.sample_steps,
        guidance=settings.guidance,
    )


@register
class SelectiveAmnesia(TrainedMethod):
    """Surrogate, replay and elastic weights; minutes, of which the Fisher information is made once a model."""

    id = "selective_amnesia"
    title = "Selective Amnesia (surrogate, replay, elastic weights)"
    paper = "https://arxiv.org/abs/2305.10120"
    message = "learning the surrogate"
    Settings = SelectiveAmnesiaSettings
    presets = {
        # the authors': AdamW 1e-5, batches of 4 (on each of 4 GPUs), γ = 1, λ = 50, the bare name as prompt, dense
        # weights. Not theirs: attn2 alone and not the whole UNet; 48 pictures and 600 steps in place of 1,000 and 200
        # rounds of them; an unbiased estimate in place of the exact Fisher information of 5,000 pictures
        "published": SelectiveAmnesiaSettings(
            steps=600,
            lr=1e-5,
            train=PROJECTIONS,
            rank=None,
            templates=("{}",),
            n_images=48,
            replay_images=48,
            guidance=7.5,
            ewc_weight=50.0,
            ewc_scale="published",
            earlier_weight=0.0,
        ),
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
        ),
    }

    def uses_images(self, settings: SelectiveAmnesiaSettings) -> bool:
        return settings.surrogate == "images"

    def _refuse_without_use(self, request: ForgetRequest, settings: SelectiveAmnesiaSettings, inputs: Inputs) -> None:
        if inputs.images and settings.surrogate != "images":
            raise RequestError(
                f"There are pictures of '{next(iter(inputs.images))}', which Selective Amnesia does not look at with "
                "these settings: leave them out, or set 'surrogate' to 'images' if they show what is to come in its "
                "place."
            )
        super()._refuse_without_use(request, settings, inputs)

    def refuse(self, request: ForgetRequest, settings: SelectiveAmnesiaSettings, inputs: Inputs) -> None:
        if settings.surrogate == "prompt":
            return
        replaced = [concept.name for concept in request.concepts if concept.replacement_text]
        if replaced:
            raise RequestError(
                f"With 'surrogate' set to '{settings.surrogate}' a replacement is not looked at, and '{replaced[0]}' "
                "has one: leave it out, or set 'surrogate' to 'prompt'."
            )
        lacking = [concept.name for concept in request.concepts if concept.name not in inputs.images]
        if settings.surrogate == "images" and lacking:
            raise RequestError(
                f"'surrogate' is 'images', and there are no pictures for '{lacking[0]}': give some that show what is "
                "to come in its place, or set 'surrogate' to 'prompt' or 'noise'."
            )

    def prompts(
        self, encoder: TextEncoder, request: ForgetRequest, settings: SelectiveAmnesiaSettings
    ) -> tuple[list[TargetPrompt], list[str]]:
        """As for every trained method, each target with its surrogate's prompt."""
        for concept in request.concepts:
            _refuse_the_same(encoder, concept.name, concept.replacement_text)
        targets, kept = super().prompts(encoder, request, settings)
        names = [concept.name for concept in request.concepts]
        # a context that names another of the concepts would teach that one again
        targets = [
            dataclasses.replace(target, instead=replace_phrase(target.text, target.concept, ""))
            if target.instead is None
            else target
            for target in targets
            if not any(_says(target.text, name) and not _says(target.concept, name) for name in names)
        ]
        meant = (*request.preserve, *settings.retain_prompts)
        banned = [name for name in names if not any(_says(phrase, name) for phrase in meant)]
        if settings.keep_common and kept:
            kept += fisher_prompts()
        kept = [text for text in kept if not any(_says(text, name) for name in banned)]
        return targets, list(dict.fromkeys(kept))

    def picture(
        self, batches: BatchSampler, settings: SelectiveAmnesiaSettings, inputs: Inputs, progress: Progress | None
    ) -> None:
        """A pool for every target prompt (of its surrogate) or every concept (pictures, noise), one for every kept."""
        model, generator = batches.model, batches.generator
        of: dict[str, list[TargetPrompt]] = {}
        for target in batches.targets:
            of.setdefault(target.concept, []).append(target)
        for name, targets in of.items():
            if settings.surrogate == "prompt":
                wanted = {target.text: [target.instead or ""] for target in targets}
                batches.draw(wanted, -(-settings.n_images // len(targets)), progress)
            elif settings.surrogate == "images":
                batches.encode(name, inputs.images[name])
            else:
                batches.pools[name] = _noise(model, settings.n_images, generator)
        if batches.kept:
            order = torch.randperm(len(batches.kept) - 1, generator=generator).tolist()
            shuffled, common = [batches.kept[1 + i] for i in order], set(fisher_prompts())
            # what the person named goes first (a stable sort)
            shuffled.sort(key=lambda text: text in common)
            batches.kept = [batches.kept[0], *shuffled[: settings.replay_images - 1]]
            batches.draw({text: [text] for text in batches.kept}, settings.replay_images // len(batches.kept), progress)

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
    """``F`` in the unit of ``λ``, on the weights' devices: divided by ``Σ F θ*²``, or times ``T²`` as published."""
    weights = {key: model.survey.linear(key).weight.detach() for key in fisher}
    found = {key: value.to(weights[key].device) for key, value in fisher.items()}
    if scale == "published":
        return {key: value * float(model.train_steps) ** 2 for key, value in found.items()}
    return relative_fisher(found, weights)


class SelectiveAmnesiaObjective(BaseObjective):
    """The three terms of one step: ``surrogate`` (to forget), ``replay`` and ``elastic`` (to keep)."""

    def __init__(
        self,
        batches: BatchSampler,
        deltas: Deltas,
        settings: SelectiveAmnesiaSettings,
        fisher: Mapping[str, Tensor],
    ) -> None:
        """``fisher`` is :func:`scaled_fisher`, empty without the penalty."""
        super().__init__(batches, deltas)
        self.settings, self.fisher = settings, dict(fisher)

    def __call__(self, step: int) -> Terms:
        s = self.settings
        targets = self.batches.next_targets()
        pools = [target.text if s.surrogate == "prompt" else target.concept for target in targets]
        terms = {"surrogate": Term(surrogate_matching(*self._denoised(pools, [target.text for target in targets])))}
        if self.batches.kept:
            texts = self.batches.next_retain()
            terms["replay"] = Term(replay_matching(*self._denoised(texts, texts)), s.preserve_weight, "retain")
        if self.fisher:
            terms["elastic"] = Term(elastic_penalty(self.deltas.changes(), self.fisher), s.ewc_weight, "retain")
        return terms | self.preserve_earlier(s.earlier_weight, s.batch_size)

    def _denoised(self, pools: Sequence[str], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The predicted and the true noise of a batch of these pools' samples under these prompts."""
        batch = self.batches.noised(pools)
        return self.predicted(batch.x, batch.times, texts), batch.noise


def _noise(model: LatentDiffusion, count: int, generator: torch.Generator) -> Tensor:
    """Uniform noise as pictures, read in by the autoencoder; without one, as latents of variance 1."""
    if model.vae is None:
        uniform = torch.rand(count, *model.latent_shape, generator=generator)
        return ((2 * uniform - 1) * 3**0.5).to(model.device)
    height, width = (8 * side for side in model.latent_shape[1:])
    uniform = torch.rand(count, 3, height, width, generator=generator)
    return torch.cat([model.vae.encode(2 * part - 1) for part in uniform.split(16)]).float().to(model.device)


def _says(text: str, phrase: str) -> bool:
    return normalized_phrase(phrase) in normalized_phrase(text)


def _refuse_the_same(encoder: TextEncoder, name: str, instead: str) -> None:
    """Raise where the surrogate's prompt would say the concept itself."""
    wanted, said = list(encoder.phrase_ids(name)), list(encoder.phrase_ids(instead)) if instead else []
    if any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1)):
        raise RequestError(
            f"The replacement '{instead}' says the concept '{name}' itself: its pictures would show what is to be "
            "forgotten. Name something else."
        )
