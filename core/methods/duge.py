"""DUGE: decremental unlearning without generalization erosion, for sequences of requests.

Thakral et al., *Continual Unlearning for Foundational Text-to-Image Models without Generalization Erosion* (arXiv
2503.13769). At request ``n`` the model that the earlier requests left is frozen as ``φ_n``, and
``L = L_U + λ_p L_pr + λ_r L_reg`` is minimized:

- ``L_U = mean_l (A_l^θ(x_t, t, c_f) − A_l^{φ_n}(x_t, t, ∅))²``: every cross-attention site matches, under the target
  prompt, what the frozen model computes under the empty one. ``A`` is the site's output or its attention map, as a
  setting *(reading)*. Extension: with a replacement, its prompt takes the place of the empty one.
- ``L_pr``: prior preservation, the denoising loss on a small memory of images of the retain set under their own
  prompts.
- ``L_reg``: ``‖θ − φ_0‖²``, and distillation on the prompts to preserve *(reading)*. Both are relative to the **base**
  model, so drift does not accumulate over requests (CUIG, arXiv 2511.07970).

Additions: ``earlier_weight`` preserves what ``φ_n`` predicts for earlier forgotten concepts, which ``L_reg`` alone
would restore. ``project`` applies CUIG's null-space projection for the text states of the retain set. ``local`` trains
each site on its own: a site's output at a pixel depends only on that pixel and the text, so matching every site on
inputs captured once matches the whole network without a pass through it.

The paper's public pages state no hyperparameters. The preset ``published`` uses its losses with all weights 1, at the
learning rate and length that UnlearnCanvas (arXiv 2402.11846) found for the similar loss of Forget-Me-Not.
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
from ..models.model_survey import PROJECTIONS
from ..models.text_encoders import TextEncoder
from ..progress import Progress, ProgressEvent, report_progress
from ..prompts.everyday import CONTEXTS
from ..prompts.pairs import mentions
from ..request.request import ForgetRequest
from ..request.settings import setting
from ..training.activations import (
    SiteCapture,
    attention_map,
    cross_attention_map,
    cross_attention_output,
    gather_pixels,
)
from ..training.adapters import Deltas
from ..training.attention import AttentionCapture
from ..training.batches import BatchSampler, Noised, TargetPrompt
from ..training.gradients import NoFreeDirection, retain_basis
from ..training.loop import Term, Terms
from ..training.losses import attention_output_matching, drift_from_base, prior_preservation
from .base import Inputs
from .registry import register
from .text_columns import common_prompts
from .trained import BaseObjective, TrainedMethod
from .trained_settings import NoReplacement, TrainedSettings
from .uce_settings import UCESettings

__all__ = ["DUGE", "DugeObjective", "DugeSettings", "anchor_prompt"]

MEMORY = "\0memory"  # name of a pool; no concept has it


@dataclass(frozen=True)
class DugeSettings(TrainedSettings):
    """Settings of :class:`DUGE`, in addition to those of every trained method.

    ``prior_weight`` is λ_p. ``anchor_weight`` and ``preserve_weight`` are the two parts of λ_r: the weights of
    ``‖θ − φ_0‖² / ‖φ_0‖²`` and of the distillation.
    """

    compare: Literal["outputs", "maps"] = setting(
        "outputs", "What is compared at each cross-attention layer: its outputs, or its attention maps."
    )
    relative: bool = setting(
        True,
        "Measure each layer's difference relative to the layer's own magnitude, so that weights carry over between "
        "models.",
    )
    no_replacement: Literal["empty", "dropped", "mean", "farthest"] = setting(
        "empty",
        "What a concept without a replacement is mapped to. dropped: the same prompt without it. empty: the empty "
        "prompt. mean: the same prompts with four preserved phrases, or everyday words of its kind, that are farthest "
        "from it, in turn. farthest: with the farthest of them alone.",
    )
    local: bool = setting(
        True,
        "Train each layer on its own, on inputs recorded once: much faster and with less memory than through the whole "
        "network.",
    )
    bank: int = setting(
        64, "Recorded inputs of each layer, for forgetting and for preserving each.", minimum=1, maximum=100000, quick=2
    )
    pixels: int = setting(64, "Pixels used of each recorded input.", minimum=1, maximum=100000)
    keep_common: bool = setting(
        False, "Also preserve everyday words, in addition to the preserve list.", group="prompts"
    )
    unlearn_weight: float = setting(1.0, "Weight of unlearning.", minimum=0.001, maximum=1000, step=0.1)
    prior_weight: float = setting(
        0.0,
        "Weight of the denoising loss on remembered images of preserved concepts.",
        minimum=0,
        maximum=1000,
        step=0.1,
    )
    memory: int = setting(8, "Remembered images.", minimum=1, maximum=10000, advanced=True, quick=1)
    anchor_weight: float = setting(
        0.0, "Weight of staying close to the base model's weights.", minimum=0, maximum=1e6, step=0.1
    )
    project: float | None = setting(
        None,
        "Share of the preserved text states whose directions the change of K and V must not react to (null-space "
        "projection); 0: off.",
        minimum=1e-6,
        maximum=1,
        none_value=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare == "maps" and not {"to_q", "to_k"} & set(self.train):
            raise RequestError(
                "With 'compare' set to 'maps', 'train' must name to_q or to_k: no map depends on other projections."
            )
        if self.project is not None and not {"to_k", "to_v"} & set(self.train):
            raise RequestError(
                "'project' is for to_k and to_v, which read the text, and 'train' names neither: add one of them, or "
                "set 'project' to null."
            )


def anchor_prompt(prompt: TargetPrompt) -> str:
    """The anchor prompt of a target: the one with what it is mapped to, or else the empty prompt."""
    return prompt.replacement_text or ""


_PUBLISHED = DugeSettings(
    steps=100,
    lr=2e-5,
    batch_size=1,
    train=PROJECTIONS,
    rank=None,
    pooled=False,
    one_template=True,
    relative=False,
    local=False,
    prior_weight=1.0,
    anchor_weight=1.0,
    earlier_weight=0.0,
)


@register
class DUGE(TrainedMethod):
    """Continual unlearning by matching the outputs of cross-attention layers."""

    id = "duge"
    title = "DUGE (continual unlearning without generalization erosion)"
    paper = "https://arxiv.org/abs/2503.13769"
    message = "unlearning"
    Settings = DugeSettings
    main = ("steps", "lr", "rank", "unlearn_weight", "prior_weight", "anchor_weight", "project")
    presets = {
        "published": _PUBLISHED,
        # benchmarks/learning_rates.py chose the factor
        "published_scaled": dataclasses.replace(_PUBLISHED, lr=30 * _PUBLISHED.lr),
        # chosen on tree, mosaic and Hugo Marsh of the embedded world, and on sequences of its other concepts
        "tuned": DugeSettings(
            steps=150,
            lr=2e-3,
            weight_decay=0.0,
            batch_size=16,
            train=("to_k", "to_v"),
            rank=8,
            n_images=4,
            sample_steps=10,
            pixels=16,
            no_replacement="mean",
            contexts=True,
            keep_common=True,
        ),
    }

    def reads_attention(self, settings: DugeSettings) -> str | None:
        return "The method 'duge' compares"

    def trains_pooled(self, settings: DugeSettings) -> bool:
        # a layer that is trained on its own inputs does not see what the pooled vector changes
        return settings.pooled and not settings.local

    def no_replacement(self, settings: DugeSettings) -> NoReplacement | None:
        return None if settings.no_replacement == "empty" else settings.no_replacement

    def preserves(self, settings: DugeSettings) -> bool:
        return settings.preserve_weight > 0 or settings.prior_weight > 0 or settings.project is not None

    def check_request(self, request: ForgetRequest, settings: DugeSettings, inputs: Inputs) -> None:
        if settings.gradient != "sum" and not (settings.preserve_weight or settings.prior_weight):
            raise RequestError(
                f"The gradient rule '{settings.gradient}' balances forgetting and preserving: set 'preserve_weight' or "
                "'prior_weight' above 0, or 'gradient' to 'sum'."
            )
        if settings.latents == "zeros" and settings.prior_weight:
            raise RequestError("The prior needs images: set 'prior_weight' to 0, or 'latents' to 'generated'.")
        if settings.keep_common and not self.preserves(settings):
            raise RequestError(
                "'keep_common' is on, and these settings preserve nothing: set 'preserve_weight' above 0."
            )

    def prompts(
        self, encoder: TextEncoder, request: ForgetRequest, settings: DugeSettings
    ) -> tuple[list[TargetPrompt], list[str]]:
        targets, retain = super().prompts(encoder, request, settings)
        if settings.contexts and settings.templates is None:
            # a context that mentions another target would preserve it, or map it to this one's replacement
            conflicting = [
                c for kind in CONTEXTS for c in CONTEXTS[kind] if any(mentions(t.name, c) for t in request.concepts)
            ]
            phrases = [*(concept.name for concept in request.concepts), *request.preserve]
            excluded = {context.format(phrase) for context in conflicting for phrase in phrases}
            targets = [target for target in targets if target.text not in excluded]
            retain = [text for text in retain if text not in excluded]
        if settings.keep_common:
            retain = list(dict.fromkeys([*retain, *common_prompts(request, UCESettings(contexts=settings.contexts))]))
        return targets, retain

    def other_prompts(self, targets: Sequence[TargetPrompt], settings: DugeSettings) -> list[str]:
        return [anchor_prompt(target) for target in targets]

    def null_space(
        self, model: LatentDiffusion, batches: BatchSampler, settings: DugeSettings
    ) -> Mapping[str, Tensor] | None:
        if settings.project is None:
            return None
        states = batches.states(batches.retain).hidden.flatten(0, 1).float()
        try:
            basis = retain_basis(torch.unique(states, dim=0), settings.project)
        except NoFreeDirection as error:
            raise RequestError(
                f"The retain set spans all {states.shape[1]} directions of the text states, so nothing could be "
                f"changed: set 'project' below {settings.project:g}, or preserve fewer prompts."
            ) from error
        return {key: basis for key in self.keys(model, settings) if key.endswith((".to_k", ".to_v"))}

    def objective(
        self,
        batches: BatchSampler,
        deltas: Deltas,
        request: ForgetRequest,
        settings: DugeSettings,
        inputs: Inputs,
        progress: Progress | None,
    ) -> DugeObjective:
        memory: list[str] = []
        if settings.prior_weight:
            others = [text for text in batches.retain if text] or batches.retain
            order = torch.randperm(len(others), generator=batches.generator).tolist()
            memory = [others[i % len(others)] for i in (order * settings.memory)[: settings.memory]]
            batches.draw({MEMORY: memory}, len(memory), progress)
        objective = DugeObjective(batches, deltas, settings, memory, inputs)
        if settings.local:
            with deltas.attached():
                objective.capture(progress)
        return objective


class DugeObjective(BaseObjective):
    """Computes the terms of a step, through the whole network or site by site."""

    def __init__(
        self,
        batches: BatchSampler,
        deltas: Deltas,
        settings: DugeSettings,
        memory: Sequence[str],
        inputs: Inputs,
    ) -> None:
        super().__init__(batches, deltas)
        self.settings, self.memory = settings, list(memory)
        self.frozen: dict[str, tuple[Tensor, Tensor]] = {}
        if inputs.earlier is not None:
            for key, factor in inputs.earlier.factors.items():
                factor = factor.to(self.model.survey.linear(key).weight.device, torch.float32)
                self.frozen[key] = (factor.up, factor.down)
        self.bank: dict[str, list[Tensor]] = {}

    # -- through the network -------------------------------------------------------------------------------------

    def sites(self, batch: Noised, texts: Sequence[str]) -> list[Tensor]:
        """Every site's output, or attention map, in one pass over the batch under these prompts."""
        survey = self.model.survey
        if self.settings.compare == "outputs":
            with SiteCapture(survey) as captured:
                self.predicted(batch.x, batch.times, texts)
                return captured.outputs()
        with AttentionCapture(survey) as attention:
            self.predicted(batch.x, batch.times, texts)
            return [attention_map(attention.q[site.name], attention.k[site.name], site.heads) for site in survey]

    def _unlearning_loss(self) -> Tensor:
        prompts = self.batches.next_targets()
        batch = self.batches.noised([prompt.concept for prompt in prompts])
        with torch.no_grad(), self.deltas.using("earlier"):
            frozen = self.sites(batch, [anchor_prompt(prompt) for prompt in prompts])
        return attention_output_matching(self.sites(batch, [p.text for p in prompts]), frozen, self.settings.relative)

    def _prior_loss(self) -> Tensor:
        batches, count = self.batches, self.settings.batch_size
        rows = torch.randint(len(self.memory), (count,), generator=batches.generator)
        times = torch.randint(self.model.train_steps, (count,), generator=batches.generator)
        noise = torch.randn((count, *self.model.latent_shape), generator=batches.generator).to(self.model.device)
        x = self.model.add_noise(batches.pools[MEMORY][rows.to(self.model.device)], noise, times)
        return prior_preservation(self.predicted(x, times, [self.memory[i] for i in rows.tolist()]), noise)

    # -- site by site --------------------------------------------------------------------------------------------

    def capture(self, progress: Progress | None = None) -> None:
        """Fill the bank with inputs of every site, under the anchor prompts and under the prompts to preserve."""
        batches, s = self.batches, self.settings
        sides: tuple[tuple[str, Literal["base", "earlier"]], ...] = (("targets", "earlier"), ("retain", "base"))
        for side, variant in sides:
            captures: list[list[Tensor]] = []
            for start in range(0, s.bank, s.batch_size):
                report_progress(progress, ProgressEvent(start, s.bank, message="recording what the layers read"))
                count = min(s.batch_size, s.bank - start)
                if side == "targets":
                    prompts = batches.next_targets(count)
                    batch = batches.noised([prompt.concept for prompt in prompts])
                    texts = [anchor_prompt(prompt) for prompt in prompts]
                elif batches.retain:
                    texts = batches.next_retain(count)
                    batch = batches.noised([self.retain_pool()] * count)
                else:
                    return
                with torch.no_grad(), self.deltas.using(variant), SiteCapture(self.model.survey) as captured:
                    self.predicted(batch.x, batch.times, texts)
                    captures.append([self._sample_pixels(x) for x in captured.inputs()])
            self.bank[side] = [torch.cat(parts) for parts in zip(*captures, strict=True)]

    def _sample_pixels(self, x: Tensor) -> Tensor:
        """``pixels`` random pixels of each row of ``(batch, pixels, width)``."""
        pixels = x.shape[1]
        if pixels <= self.settings.pixels:
            return x.clone()
        order = torch.rand(x.shape[:2], generator=self.batches.generator).argsort(1)
        return gather_pixels(x, order[:, : self.settings.pixels])

    def _matching_loss(
        self, side: str, texts: Sequence[str], variant: Literal["base", "earlier"], anchors: Sequence[str] | None = None
    ) -> Tensor:
        """Match every site under ``texts`` to the frozen model under ``anchors`` (default: ``texts``)."""
        bank = self.bank.get(side) or self.bank["targets"]
        rows = torch.randint(len(bank[0]), (len(texts),), generator=self.batches.generator)
        evaluate = cross_attention_output if self.settings.compare == "outputs" else cross_attention_map
        context, anchor_context = self._context(texts), self._context(texts if anchors is None else anchors)
        outputs, targets = [], []
        for site, inputs in zip(self.model.survey, bank, strict=True):
            x = inputs[rows.to(inputs.device)]
            with torch.no_grad(), self.deltas.using(variant):
                targets.append(evaluate(site, x, anchor_context))
            outputs.append(evaluate(site, x, context))
        return attention_output_matching(outputs, targets, self.settings.relative)

    def _earlier_loss(self, texts: Sequence[str]) -> Tensor:
        return self._matching_loss("retain", texts, "earlier") if self.settings.local else super()._earlier_loss(texts)

    def _context(self, texts: Sequence[str]) -> Tensor:
        return self.batches.states(texts).to(self.model.device, self.model.dtype).hidden

    # -- one step ------------------------------------------------------------------------------------------------

    def __call__(self, step: int) -> Terms:
        s, batches = self.settings, self.batches
        terms: dict[str, Term] = {}
        if s.local:
            prompts = batches.next_targets()
            anchors = [anchor_prompt(prompt) for prompt in prompts]
            terms["unlearn"] = Term(
                self._matching_loss("targets", [p.text for p in prompts], "earlier", anchors), s.unlearn_weight
            )
        else:
            terms["unlearn"] = Term(self._unlearning_loss(), s.unlearn_weight)
        if s.prior_weight:
            terms["prior"] = Term(self._prior_loss(), s.prior_weight, "retain")
        if s.anchor_weight:
            weights = {key: self.model.survey.linear(key).weight for key in self.deltas.keys}
            drift = drift_from_base(self.deltas.changes(), weights, self.frozen)
            terms["anchor"] = Term(drift, s.anchor_weight, "retain")
        if s.preserve_weight:
            if s.local:
                preserve = self._matching_loss("retain", batches.next_retain(), "base")
                terms["preserve"] = Term(preserve, s.preserve_weight, "retain")
            else:
                terms["preserve"] = self.preserve(s.preserve_weight)
        terms |= self.preserve_earlier(s.earlier_weight, s.batch_size)
        return terms
