"""Forget-Me-Not: attention re-steering, trained end to end.

Zhang et al., *Forget-Me-Not: Learning to Forget in Text-to-Image Diffusion Models* (arXiv 2303.17591). At a random time
step one conditional pass is made; at every cross-attention site ``l`` the attention of the concept's own tokens ``S``
is looked at, and ``L = ‖concat_l A_l[..., S]‖₂`` made small, so that no pixel looks at the concept any more.

The concept is said by its name or by vectors that textual inversion learns from its pictures (:mod:`..inversion`).

The published method keeps nothing and replaces nothing. Two optional terms here do: ``preserve_weight`` keeps the noise
prediction on preserved prompts (the empty one always among them) where the base model has it, and ``steer_weight``
moves the concept's prediction to the base model's of its replacement (Concept Ablation's target, arXiv 2303.13516), or
of the prompt without it where there is none.
Where a term is off and a request asks for what it does, the request is refused: nothing is ignored in silence.

**Correction.** A name may have a sense, an attribute or a bias that is to go, while the name stays in use (concept
correction and disentanglement, §4). ``unwanted`` says what it is no longer to show, ``wanted`` what it is to show from
now on, as phrases in the name's place. Published, in our reading, is the attention loss on pictures of the unwanted
under the name's own prompts. With ``wanted`` phrases ``w_j`` the name's prediction is also moved to the base model's
under them, on pictures of the unwanted and of each wanted alike. On pictures of the wanted that has a meaning: what
minimises
``Σ_j E_{x_0 ~ p(·|w_j)} ‖ε_θ(x_t, t, name) − ε_base(x_t, t, w_j)‖²`` is ``Σ_j p(w_j | x_t) ε_base(x_t, t, w_j)``, the
exact prediction for pictures of which each ``w_j`` has an equal share. So one wanted phrase is a sense that stays,
and several make a biased word an even one.

A model that confuses two senses confuses them under longer phrases too, and the targets with them: ``contrast`` ``η``
steers to ``ε_base(w_j) + η (ε_base(w_j) − ε_base(u_j))`` instead, away from an unwanted ``u_j`` (from the name itself
where none is given), as guidance does when a picture is drawn.
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
from ..models.latent_diffusion import LatentDiffusion
from ..models.text_encoders import TextEncoder
from ..models.token_positions import end_position
from ..models.unet import PROJECTIONS
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
from .trained import BaseObjective, TrainedMethod, TrainedSettings

__all__ = ["ForgetMeNot", "ForgetMeNotObjective", "ForgetMeNotSettings"]

# the pools of pictures of what a name is to show; no name of a concept begins so
_WANTED = "\nwanted: "


@dataclass(frozen=True)
class ForgetMeNotSettings(TrainedSettings):
    """Settings of :class:`ForgetMeNot`, in addition to those of every trained method.

    The three weights compare root-mean-square attention mass and mean squared noise, so that they carry over between
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
    # with ``latents`` "images" the pictures are of the unwanted
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_weight == 0 and self.steer_weight == 0:
            raise RequestError("With 'attention_weight' and 'steer_weight' both 0 nothing would be forgotten.")
        phrases = [normalized_phrase(_bare(phrase)) for phrase in (*self.unwanted, *self.wanted)]
        if not all(phrases) or len(set(phrases)) < len(phrases):
            raise RequestError("A phrase in 'unwanted' and 'wanted' is empty, or there twice.")
        if phrases and self.latents == "zeros":
            raise RequestError("'unwanted' and 'wanted' need pictures: set 'latents' to 'generated' or 'images'.")
        if self.unwanted and self.latents == "images":
            raise RequestError("With 'latents' 'images' the pictures are what is unwanted: leave 'unwanted' out.")
        if self.contrast and not self.wanted:
            raise RequestError("'contrast' above 0 needs phrases that are 'wanted'.")
        if self.wanted and self.steer_weight == 0:
            raise RequestError("With 'steer_weight' 0 nothing would show what is 'wanted': set it above 0.")
        if self.wanted and self.attention_weight and not self.resteers:
            raise RequestError(
                "There is nothing to turn attention away from: say what is 'unwanted', or set 'attention_weight' to 0."
            )

    @property
    def resteers(self) -> bool:
        """Whether there are pictures to turn attention away from."""
        return not self.wanted or bool(self.unwanted) or self.latents == "images"


_CORRECTION = ForgetMeNotSettings(steps=60, lr=2e-3, train=("to_k", "to_v"), attention_weight=0.0)


@register
class ForgetMeNot(TrainedMethod):
    """Attention re-steering end to end; seconds to minutes, by the model's size."""

    id = "forget_me_not"
    title = "Forget-Me-Not (attention re-steering)"
    paper = "https://arxiv.org/abs/2303.17591"
    message = "re-steering attention"
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
            earlier_weight=0.0,
        ),
        # chosen on tree, mosaic and Hugo Marsh of the embedded world
        "tuned": ForgetMeNotSettings(
            steps=60,
            lr=3e-3,
            train=("to_k", "to_v"),
            contexts=True,
            preserve_weight=10.0,
            steer_weight=10.0,
            earlier_weight=10.0,
        ),
        # a name loses a sense, an attribute or a bias: 'unwanted' and 'wanted' say which
        "correction": _CORRECTION,
        # many names at once: a whole theme
        "theme": dataclasses.replace(_CORRECTION, lr=5e-3, rank=16, n_images=4),
    }

    def refuse(self, request: ForgetRequest, settings: ForgetMeNotSettings, inputs: Inputs) -> None:
        replaced = [concept.name for concept in request.concepts if concept.replacement_text]
        lacking = [concept.name for concept in request.concepts if concept.name not in inputs.images]
        if settings.concept_source == "inversion" and lacking:
            raise RequestError(
                f"'concept_source' is 'inversion', and there are no pictures of '{lacking[0]}' to learn it from: give "
                "some, or set it to 'name'."
            )
        if (settings.unwanted or settings.wanted) and len(request.concepts) > 1:
            raise RequestError("'unwanted' and 'wanted' are about one name; correct several names in several requests.")
        if settings.wanted:
            if replaced:
                raise RequestError(
                    f"'{replaced[0]}' has a replacement, and 'wanted' also says what it is to show: give one of them."
                )
            return
        if replaced and settings.steer_weight == 0:
            raise RequestError(
                f"Forget-Me-Not as published replaces nothing, and '{replaced[0]}' has a replacement: leave it out, "
                "set 'steer_weight' above 0, or use another preset or method."
            )
        if settings.attention_weight == 0 and len(replaced) < len(request.concepts):
            unreplaced = next(concept.name for concept in request.concepts if not concept.replacement_text)
            raise RequestError(
                f"With 'attention_weight' 0 nothing would make the model forget '{unreplaced}': give a replacement, or "
                "say what is 'wanted' in its place."
            )

    def drops(self, settings: ForgetMeNotSettings) -> bool:
        return settings.steer_weight > 0 and not settings.wanted

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
        """As every trained method; with ``concept_source`` ``"inversion"`` the concepts' vectors are learned first."""
        if settings.concept_source == "inversion":
            self._refuse_without_use(request, settings, inputs)
            self.refuse(request, settings, inputs)
            vectors = {
                c.name: _inverted(model, c.name, c.kind, request.seed, settings, inputs, progress)
                for c in request.concepts
            }
            model = with_vectors(model, {_slot(name): several for name, several in vectors.items()})
            request = dataclasses.replace(
                request, concepts=tuple(dataclasses.replace(c, name=_slot(c.name)) for c in request.concepts)
            )
            images = {_slot(name): images for name, images in inputs.images.items()}
            inputs = dataclasses.replace(inputs, images=images)
        return super().train_patch(model, request, settings, progress, inputs)

    def prompts(
        self, encoder: TextEncoder, request: ForgetRequest, settings: ForgetMeNotSettings
    ) -> tuple[list[TargetPrompt], list[str]]:
        targets, kept = super().prompts(encoder, request, settings)
        said = [text for target in targets for text in _in_place(target, settings.wanted)]
        for text in [*said, *(text for target in targets for text in _in_place(target, settings.unwanted))]:
            end_position(encoder, text)  # raises where it is cut off
        if kept:  # under their own words the wanted stay what they are
            own = {target.text for target in targets}
            kept = list(dict.fromkeys([*kept, *(text for text in said if text not in own)]))
        return targets, kept

    def other_prompts(self, targets: Sequence[TargetPrompt], settings: ForgetMeNotSettings) -> list[str]:
        return [text for target in targets for text in _in_place(target, settings.wanted + settings.unwanted)]

    def picture(
        self, batches: BatchSampler, settings: ForgetMeNotSettings, inputs: Inputs, progress: Progress | None
    ) -> None:
        if not (settings.unwanted or settings.wanted):
            return super().picture(batches, settings, inputs, progress)
        name = batches.targets[0].concept
        scenes: dict[str, tuple[str, ...]] = {_WANTED + phrase: (phrase,) for phrase in settings.wanted}
        if settings.unwanted:
            scenes[name] = settings.unwanted
        drawn = {
            pool: [text for target in batches.targets for text in _in_place(target, phrases)]
            for pool, phrases in scenes.items()
        }
        if batches.kept:
            order = torch.randperm(len(batches.kept), generator=batches.generator).tolist()
            drawn[RETAIN_POOL] = [batches.kept[i] for i in order]
        batches.draw(drawn, settings.n_images, progress)
        if settings.latents == "images":
            batches.encode(name, inputs.images[name])
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


def _slot(name: str) -> str:
    """What stands for a concept in a prompt that is given its vectors."""
    return f"<{name}>"


def _inverted(
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
            f"Pictures of '{name}' were given, and this model has no autoencoder here to read them with."
        )
    images = inputs.images[name]
    latents = torch.cat([model.vae.encode(images[i : i + 16]) for i in range(0, len(images), 16)])
    how = InversionSettings(
        settings.tokens,
        settings.inversion_steps,
        settings.inversion_lr,
        batch_size=settings.batch_size,
        templates=settings.said(kind),
    )
    return invert(model, latents, how, seed, progress, workspace=inputs.workspace)


def _bare(phrase: str) -> str:
    return re.sub(r"^\s*(an?|the)\s+", "", phrase, flags=re.IGNORECASE)


def _in_place(target: TargetPrompt, phrases: tuple[str, ...]) -> list[str]:
    """The prompt with each phrase said for the concept's name."""
    return [replace_phrase(target.text, target.concept, _bare(phrase)) for phrase in phrases]


@dataclass(frozen=True)
class _Row:
    """One row of a batch: its prompt, the pool of its picture, the prompt it is steered to, whether attention is turned
    away from it, and the prompt it is steered away from."""

    prompt: TargetPrompt
    pool: str
    instead: str | None
    resteered: bool
    against: str | None = None


class ForgetMeNotObjective(BaseObjective):
    """The terms of one step: the published loss on a batch of the concept's prompts, and the optional ones."""

    def __init__(self, batches: BatchSampler, deltas: Deltas, settings: ForgetMeNotSettings) -> None:
        super().__init__(batches, deltas)
        self.settings = settings

    def _rows(self, step: int) -> list[_Row]:
        s, prompts = self.settings, self.batches.next_targets()
        if not s.wanted:
            return [_Row(prompt, prompt.concept, prompt.instead, True) for prompt in prompts]
        rows = []
        for i, prompt in enumerate(prompts, step * len(prompts)):
            # the unwanted and the wanted by turns, and each wanted phrase as often as any other
            away = s.resteers and i % 2 == 0
            j = (i // 2 if s.resteers else i) % len(s.wanted)
            pool = prompt.concept if away else _WANTED + s.wanted[j]
            against = None
            if s.contrast:
                against = _in_place(prompt, s.unwanted)[j % len(s.unwanted)] if s.unwanted else prompt.text
            rows.append(_Row(prompt, pool, _in_place(prompt, s.wanted)[j], away, against))
        return rows

    def _steered(self, x: Tensor, times: Tensor, rows: Sequence[_Row]) -> Tensor:
        """The base model's prediction that each of these rows is moved to."""
        wanted = self.base(x, times, [row.instead or "" for row in rows])
        if all(row.against is None for row in rows):
            return wanted
        against = self.base(x, times, [row.against or row.instead or "" for row in rows])
        return contrast_target(wanted, against, self.settings.contrast)

    def __call__(self, step: int) -> Terms:
        s, model = self.settings, self.model
        terms: dict[str, Term] = {}
        rows = self._rows(step)
        batch = self.batches.noised([row.pool for row in rows])
        states = self.batches.states([row.prompt.text for row in rows])
        mask = token_mask([row.prompt.positions for row in rows], states.hidden.shape[1], batch.x.device)
        away = [i for i, row in enumerate(rows) if row.resteered]
        # entered after the deltas were attached: what is recorded has them in it
        scale = 1.0
        with AttentionCapture(model.survey) as recorder:
            predicted = model.predict_noise(batch.x, batch.times, states)
            if s.attention_weight:
                masses = recorder.masses(mask)
                if away:
                    masses = [mass[away] for mass in masses]
                    terms["attention"] = Term(attention_resteering(masses), s.attention_weight)
                # the published norm grows with the root of their number, a mean does not: brought to one scale
                scale = sum(mass.numel() for mass in masses) ** 0.5
        steered = [i for i, row in enumerate(rows) if row.instead is not None]
        if s.steer_weight and steered:
            wanted = self._steered(batch.x[steered], batch.times[steered], [rows[i] for i in steered])
            # what is not turned away from shows what the name is to keep
            away_or_not: tuple[tuple[str, Side, bool], ...] = (("steer", "forget", True), ("show", "retain", False))
            for name, side, resteered in away_or_not:
                if chosen := [k for k, i in enumerate(steered) if rows[i].resteered is resteered]:
                    error = noise_matching(predicted[[steered[k] for k in chosen]], wanted[chosen])
                    terms[name] = Term(error, scale * s.steer_weight, side)
        if self.batches.kept:
            terms["preserve"] = self.preserve(scale * s.preserve_weight)
        return terms | self.preserve_earlier(scale * s.earlier_weight, s.batch_size)
