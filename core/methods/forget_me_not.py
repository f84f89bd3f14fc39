"""Forget-Me-Not: attention re-steering, trained end to end.

Zhang et al., *Forget-Me-Not: Learning to Forget in Text-to-Image Diffusion Models* (arXiv 2303.17591). Each step makes
one conditional pass at a random time step and minimizes ``L = ‖concat_l A_l[..., S]‖₂``, the attention on the concept's
tokens ``S`` at all cross-attention sites ``l``, so that no pixel attends to the concept.

The concept is given by its name, or by vectors that textual inversion learns from images of it
(:mod:`~..training.textual_inversion`).

The published method has no retain set and no replacement. Two optional terms add them. ``preserve_weight`` preserves
the base model's noise prediction for the prompts to preserve, always including the empty one. ``steer_weight`` moves
the concept's prediction to the base model's prediction for the replacement (the target of Concept Ablation, arXiv
2303.13516), or for the prompt without the concept if there is no replacement. A request that needs a term that is off
is an error, so that no part of it is ignored.

**Correction** (concept correction and disentanglement, §4) removes a sense, an attribute or a bias of a name that
remains in use. ``unwanted`` and ``wanted`` list phrases that say what the name must no longer show and what it shows
from now on. As published, in our reading, the attention loss is applied on images of the unwanted phrases under the
name's own prompts. With ``wanted`` phrases ``w_j``, the name's prediction is also moved to the base model's prediction
for them, on images of the unwanted and of each wanted phrase. On images of the wanted phrases, the minimizer of
``Σ_j E_{x_0 ~ p(·|w_j)} ‖ε_θ(x_t, t, name) − ε_base(x_t, t, w_j)‖²`` is ``Σ_j p(w_j | x_t) ε_base(x_t, t, w_j)``, the
exact prediction for images of which each ``w_j`` has an equal share. So a single wanted phrase is the sense that
remains, and several phrases balance a biased name.

A model that confuses two senses also confuses them in longer phrases, so these targets are confused as well.
``contrast`` ``η`` replaces the target by ``ε_base(w_j) + η (ε_base(w_j) − ε_base(u_j))``, away from an unwanted ``u_j``
(from the name itself if none is given), as guidance does in sampling.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import RequestError
from ..models.autoencoders import encode_images
from ..models.latent_diffusion import LatentDiffusion
from ..models.model_survey import PROJECTIONS
from ..models.text_encoders import TextEncoder
from ..models.token_positions import end_position
from ..patch.patch import Patch
from ..progress import Progress
from ..prompts.phrases import replace_phrase
from ..request.concept import normalized_phrase
from ..request.request import ForgetRequest
from ..request.settings import setting
from ..training.adapters import Deltas
from ..training.attention import AttentionCapture, token_mask
from ..training.batches import RETAIN_POOL, BatchSampler, TargetPrompt
from ..training.loop import Side, Term, Terms
from ..training.losses import attention_resteering, contrast_target, noise_matching
from ..training.textual_inversion import InversionSettings, invert, with_vectors
from .base import Inputs
from .registry import register
from .trained import BaseObjective, TrainedMethod
from .trained_settings import NoReplacement, TrainedSettings

__all__ = ["ForgetMeNot", "ForgetMeNotObjective", "ForgetMeNotSettings"]

# prefix of the pools of images of wanted phrases; no concept's name starts with it
_WANTED = "\nwanted: "


@dataclass(frozen=True)
class ForgetMeNotSettings(TrainedSettings):
    """Settings of :class:`ForgetMeNot`, in addition to those of every trained method.

    The weights are relative to root-mean-square attention mass and mean squared noise, so they carry over between
    models of any size.
    """

    attention_weight: float = setting(
        1.0, "Weight of turning attention away from the concept.", minimum=0, maximum=1000, step=0.1
    )
    steer_weight: float = setting(
        1.0,
        "Weight of steering the concept to its replacement, or to the prompt without it.",
        minimum=0,
        maximum=1000,
        step=0.1,
    )
    scope: Literal["cross_attention", "unet"] = setting(
        "cross_attention",
        "Layers that are trained. cross_attention: those that read the text. unet: self-attention and feed-forward "
        "layers too.",
        advanced=True,
    )
    concept_source: Literal["name", "inversion"] = setting(
        "name",
        "How the concept is given. name: by its name. inversion: by vectors learned from your images of it.",
    )
    tokens: int = setting(
        4, "Vectors that the inversion learns.", minimum=1, maximum=64, advanced=True, group="inversion"
    )
    inversion_steps: int = setting(
        500, "Steps of the inversion.", minimum=1, maximum=100000, advanced=True, group="inversion"
    )
    inversion_lr: float = setting(
        1e-3,
        "Learning rate of the inversion.",
        minimum=1e-7,
        maximum=1,
        step=1e-6,
        advanced=True,
        group="inversion",
    )
    # with ``latents`` "images", the user's images show what is unwanted
    unwanted: tuple[str, ...] = setting(
        (),
        "Correction: what the name must no longer show, one phrase per line, such as wooden bat for bat.",
        advanced=True,
        group="correction",
    )
    wanted: tuple[str, ...] = setting(
        (),
        "Correction: what the name shows from now on, one phrase per line, each equally often.",
        advanced=True,
        group="correction",
    )
    contrast: float = setting(
        0.0,
        "Correction: how far the name is moved beyond the wanted phrases, away from the unwanted ones.",
        minimum=0,
        maximum=100,
        step=0.1,
        advanced=True,
        group="correction",
    )
    no_replacement: Literal["dropped", "mean", "farthest"] = setting(
        "dropped",
        "What a concept without a replacement is steered to. dropped: the same prompt without it. mean: the same "
        "prompts with four preserved phrases, or everyday words of its kind, that are farthest from it, in turn. "
        "farthest: with the farthest of them alone.",
        group="prompts",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_weight == 0 and self.steer_weight == 0:
            raise RequestError(
                "With 'attention_weight' and 'steer_weight' both 0 nothing would be forgotten: set one of them above 0."
            )
        phrases = [normalized_phrase(_without_article(phrase)) for phrase in (*self.unwanted, *self.wanted)]
        if not all(phrases) or len(set(phrases)) < len(phrases):
            raise RequestError("A phrase in 'unwanted' or 'wanted' is empty or given twice: remove it.")
        if phrases and self.latents == "zeros":
            raise RequestError("'unwanted' and 'wanted' need images: set 'latents' to 'generated' or 'images'.")
        if self.unwanted and self.latents == "images":
            raise RequestError(
                "With 'latents' set to 'images', the images show what is unwanted: leave 'unwanted' out."
            )
        if self.contrast and not self.wanted:
            raise RequestError("'contrast' above 0 needs phrases in 'wanted': give some, or set it to 0.")
        if self.wanted and self.steer_weight == 0:
            raise RequestError("With 'steer_weight' 0 the 'wanted' phrases have no effect: set it above 0.")
        if self.wanted and self.attention_weight and not self.resteers:
            raise RequestError(
                "There is nothing to turn attention away from: give phrases in 'unwanted', or set "
                "'attention_weight' to 0."
            )

    @property
    def resteers(self) -> bool:
        """Whether there are images to turn attention away from."""
        return not self.wanted or bool(self.unwanted) or self.latents == "images"


# the authors': all projections of attn2, dense, batch size 1, 35 steps; no retain set, no replacement
_PUBLISHED = ForgetMeNotSettings(
    lr=2e-6,
    batch_size=1,
    train=PROJECTIONS,
    rank=None,
    pooled=False,
    one_template=True,
    preserve_weight=0.0,
    steer_weight=0.0,
    earlier_weight=0.0,
)
# chosen on tree, mosaic and Hugo Marsh of the embedded world
_TUNED = ForgetMeNotSettings(
    steps=60,
    lr=3e-3,
    train=("to_k", "to_v"),
    contexts=True,
    preserve_weight=10.0,
    steer_weight=10.0,
    earlier_weight=10.0,
    # in so few steps one target is learned, and four are not: a person was still drawn in 12 of 48 pictures
    no_replacement="farthest",
)
_CORRECTION = ForgetMeNotSettings(steps=60, lr=2e-3, train=("to_k", "to_v"), attention_weight=0.0)


@register
class ForgetMeNot(TrainedMethod):
    """Attention re-steering, trained end to end; takes seconds to minutes, depending on the model's size."""

    id = "forget_me_not"
    title = "Forget-Me-Not (attention re-steering)"
    paper = "https://arxiv.org/abs/2303.17591"
    message = "re-steering attention"
    Settings = ForgetMeNotSettings
    main = ("steps", "lr", "rank", "attention_weight", "steer_weight", "unwanted", "wanted")
    presets = {
        "published": _PUBLISHED,
        # benchmarks/learning_rates.py chose the factor
        "published_scaled": dataclasses.replace(_PUBLISHED, lr=100 * _PUBLISHED.lr),
        "tuned": _TUNED,
        # reads no attention, so that it also works on diffusion transformers; needs a replacement
        "steering": dataclasses.replace(_TUNED, attention_weight=0.0),
        # removes a sense, an attribute or a bias of a name, given by 'unwanted' and 'wanted'
        "correction": _CORRECTION,
        # many names at once: a whole theme
        "theme": dataclasses.replace(_CORRECTION, lr=5e-3, rank=16, n_images=4, steps=150, preserve_weight=3.0),
    }

    def check_request(self, request: ForgetRequest, settings: ForgetMeNotSettings, inputs: Inputs) -> None:
        replaced = [concept.name for concept in request.concepts if concept.replacement_text]
        missing = [concept.name for concept in request.concepts if concept.name not in inputs.images]
        if settings.concept_source == "inversion" and missing:
            raise RequestError(
                f"'concept_source' is 'inversion', and there are no images of '{missing[0]}' to learn it from: give "
                "some, or set it to 'name'."
            )
        if (settings.unwanted or settings.wanted) and len(request.concepts) > 1:
            raise RequestError("'unwanted' and 'wanted' are for one name: correct several names in separate requests.")
        if settings.wanted:
            if replaced:
                raise RequestError(
                    f"'{replaced[0]}' has a replacement, and 'wanted' also says what it shows: give only one of them."
                )
            return
        if replaced and settings.steer_weight == 0:
            raise RequestError(
                f"With 'steer_weight' 0 nothing is replaced, and '{replaced[0]}' has a replacement: leave it out, "
                "set 'steer_weight' above 0, or use another preset or method."
            )
        if settings.attention_weight == 0 and len(replaced) < len(request.concepts):
            unreplaced = next(concept.name for concept in request.concepts if not concept.replacement_text)
            raise RequestError(
                f"With 'attention_weight' 0 nothing would make the model forget '{unreplaced}': give a replacement, or "
                "phrases in 'wanted'."
            )

    def reads_attention(self, settings: ForgetMeNotSettings) -> str | None:
        if not settings.attention_weight:
            return None
        return "'attention_weight' is above 0 (the preset 'steering' has 0), which turns away"

    def no_replacement(self, settings: ForgetMeNotSettings) -> NoReplacement | None:
        return settings.no_replacement if settings.steer_weight > 0 and not settings.wanted else None

    def uses_images(self, settings: ForgetMeNotSettings) -> bool:
        return settings.concept_source == "inversion" or super().uses_images(settings)

    def keys(self, model: LatentDiffusion, settings: ForgetMeNotSettings) -> list[str]:
        if settings.scope == "cross_attention":
            return super().keys(model, settings)
        return [key for key in model.survey.layers if ".ff." in key or key.rpartition(".")[2] in settings.train]

    def train_patch(
        self,
        model: LatentDiffusion,
        request: ForgetRequest,
        settings: ForgetMeNotSettings,
        progress: Progress | None,
        inputs: Inputs,
    ) -> Patch:
        """As every trained method; with ``concept_source`` ``"inversion"``, the concepts' vectors are learned first."""
        if settings.concept_source == "inversion":
            self._check_inputs(request, settings, inputs)
            self.check_request(request, settings, inputs)
            vectors = {
                c.name: _learn_vectors(model, c.name, c.kind, request.seed, settings, inputs, progress)
                for c in request.concepts
            }
            model = with_vectors(model, {_placeholder(name): rows for name, rows in vectors.items()})
            request = dataclasses.replace(
                request, concepts=tuple(dataclasses.replace(c, name=_placeholder(c.name)) for c in request.concepts)
            )
            images = {_placeholder(name): images for name, images in inputs.images.items()}
            inputs = dataclasses.replace(inputs, images=images)
        return super().train_patch(model, request, settings, progress, inputs)

    def prompts(
        self, encoder: TextEncoder, request: ForgetRequest, settings: ForgetMeNotSettings
    ) -> tuple[list[TargetPrompt], list[str]]:
        targets, retain = super().prompts(encoder, request, settings)
        wanted = [text for target in targets for text in _with_phrases(target, settings.wanted)]
        for text in [*wanted, *(text for target in targets for text in _with_phrases(target, settings.unwanted))]:
            end_position(encoder, text)  # raises if the prompt is cut off
        if retain:  # the wanted phrases themselves keep their meaning
            own = {target.text for target in targets}
            retain = list(dict.fromkeys([*retain, *(text for text in wanted if text not in own)]))
        return targets, retain

    def other_prompts(self, targets: Sequence[TargetPrompt], settings: ForgetMeNotSettings) -> list[str]:
        return [text for target in targets for text in _with_phrases(target, settings.wanted + settings.unwanted)]

    def fill_pools(
        self, batches: BatchSampler, settings: ForgetMeNotSettings, inputs: Inputs, progress: Progress | None
    ) -> None:
        if not (settings.unwanted or settings.wanted):
            return super().fill_pools(batches, settings, inputs, progress)
        name = batches.targets[0].concept
        phrases_by_pool: dict[str, tuple[str, ...]] = {_WANTED + phrase: (phrase,) for phrase in settings.wanted}
        if settings.unwanted:
            phrases_by_pool[name] = settings.unwanted
        prompts = {
            pool: [text for target in batches.targets for text in _with_phrases(target, phrases)]
            for pool, phrases in phrases_by_pool.items()
        }
        if batches.retain:
            order = torch.randperm(len(batches.retain), generator=batches.generator).tolist()
            prompts[RETAIN_POOL] = [batches.retain[i] for i in order]
        batches.draw(prompts, settings.n_images, progress)
        if settings.latents == "images":
            batches.encode(name, inputs.images[name], progress)
        return None

    def objective(
        self,
        batches: BatchSampler,
        deltas: Deltas,
        request: ForgetRequest,
        settings: ForgetMeNotSettings,
        inputs: Inputs,
        progress: Progress | None,
    ) -> ForgetMeNotObjective:
        return ForgetMeNotObjective(batches, deltas, settings)


def _placeholder(name: str) -> str:
    """The phrase that stands for a concept's learned vectors in prompts."""
    return f"<{name}>"


def _learn_vectors(
    model: LatentDiffusion,
    name: str,
    kind: str,
    seed: int,
    settings: ForgetMeNotSettings,
    inputs: Inputs,
    progress: Progress | None,
) -> Tensor:
    if model.vae is None:
        raise RequestError(
            f"Images of '{name}' were given, but there is no autoencoder to encode them with: load the model with its "
            "VAE, or set 'concept_source' to 'name'."
        )
    latents = encode_images(model.vae, inputs.images[name], progress)
    inversion = InversionSettings(
        settings.tokens,
        settings.inversion_steps,
        settings.inversion_lr,
        batch_size=settings.batch_size,
        templates=settings.prompt_templates(kind),
    )
    return invert(model, latents, inversion, seed, progress, workspace=inputs.workspace)


def _without_article(phrase: str) -> str:
    return re.sub(r"^\s*(an?|the)\s+", "", phrase, flags=re.IGNORECASE)


def _with_phrases(target: TargetPrompt, phrases: tuple[str, ...]) -> list[str]:
    """The prompt with each of the phrases in place of the concept's name."""
    return [replace_phrase(target.text, target.concept, _without_article(phrase)) for phrase in phrases]


@dataclass(frozen=True)
class _Row:
    """One row of a batch.

    Args:
        prompt: Its prompt.
        pool: Pool of its image.
        steer_to: Prompt whose prediction it is steered to; ``None``: it is not steered.
        resteered: Whether attention to the concept is minimized.
        steer_from: Prompt whose prediction it is steered away from, if ``contrast`` is set.
    """

    prompt: TargetPrompt
    pool: str
    steer_to: str | None
    resteered: bool
    steer_from: str | None = None


class ForgetMeNotObjective(BaseObjective):
    """Computes the terms of a step: the published loss on a batch of the concept's prompts, and the optional ones."""

    def __init__(self, batches: BatchSampler, deltas: Deltas, settings: ForgetMeNotSettings) -> None:
        super().__init__(batches, deltas)
        self.settings = settings

    def _rows(self, step: int) -> list[_Row]:
        s, prompts = self.settings, self.batches.next_targets()
        if not s.wanted:
            return [_Row(prompt, prompt.concept, prompt.replacement_text, True) for prompt in prompts]
        rows = []
        for i, prompt in enumerate(prompts, step * len(prompts)):
            # alternate unwanted and wanted images, with equal shares of the wanted phrases
            resteered = s.resteers and i % 2 == 0
            j = (i // 2 if s.resteers else i) % len(s.wanted)
            pool = prompt.concept if resteered else _WANTED + s.wanted[j]
            steer_from = None
            if s.contrast:
                steer_from = _with_phrases(prompt, s.unwanted)[j % len(s.unwanted)] if s.unwanted else prompt.text
            rows.append(_Row(prompt, pool, _with_phrases(prompt, s.wanted)[j], resteered, steer_from))
        return rows

    def _steering_target(self, x: Tensor, times: Tensor, rows: Sequence[_Row]) -> Tensor:
        """The prediction of the base model that each of these rows is steered to."""
        target = self.base(x, times, [row.steer_to or "" for row in rows])
        if all(row.steer_from is None for row in rows):
            return target
        opposed = self.base(x, times, [row.steer_from or row.steer_to or "" for row in rows])
        return contrast_target(target, opposed, self.settings.contrast)

    def __call__(self, step: int) -> Terms:
        s, model = self.settings, self.model
        terms: dict[str, Term] = {}
        rows = self._rows(step)
        batch = self.batches.noised([row.pool for row in rows])
        states = self.batches.states([row.prompt.text for row in rows])
        mask = token_mask([row.prompt.positions for row in rows], states.hidden.shape[1], batch.x.device)
        resteered_rows = [i for i, row in enumerate(rows) if row.resteered]
        scale = 1.0
        # entered after the deltas were attached, so the captured queries and keys include them
        with AttentionCapture(model.survey) as attention:
            predicted = model.predict_noise(batch.x, batch.times, states)
            if s.attention_weight:
                masses = attention.masses(mask)
                if resteered_rows:
                    masses = [mass[resteered_rows] for mass in masses]
                    terms["attention"] = Term(attention_resteering(masses), s.attention_weight)
                # the published norm grows with the square root of the number of elements: scale the means to match
                scale = sum(mass.numel() for mass in masses) ** 0.5
        steered = [i for i, row in enumerate(rows) if row.steer_to is not None]
        if s.steer_weight and steered:
            target = self._steering_target(batch.x[steered], batch.times[steered], [rows[i] for i in steered])
            # images that attention is not turned away from show what the name keeps
            groups: tuple[tuple[str, Side, bool], ...] = (("steer", "forget", True), ("show", "retain", False))
            for name, side, resteered in groups:
                if chosen := [k for k, i in enumerate(steered) if rows[i].resteered is resteered]:
                    error = noise_matching(predicted[[steered[k] for k in chosen]], target[chosen])
                    terms[name] = Term(error, scale * s.steer_weight, side)
        if self.batches.retain:
            terms["preserve"] = self.preserve(scale * s.preserve_weight)
        return terms | self.preserve_earlier(scale * s.earlier_weight, s.batch_size)
