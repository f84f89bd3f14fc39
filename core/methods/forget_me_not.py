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

from ..attention import AttentionRecorder, token_mask
from ..concepts import ForgetRequest
from ..errors import RequestError
from ..losses import attention_resteering, noise_matching
from ..material import Material
from ..progress import Progress
from ..training import Deltas, Term, Terms
from ..unet import PROJECTIONS
from . import Inputs, register
from .trained import BaseObjective, TrainedMethod, TrainedSettings

__all__ = ["ForgetMeNot", "ForgetMeNotObjective", "ForgetMeNotSettings"]


@dataclass(frozen=True)
class ForgetMeNotSettings(TrainedSettings):
    """Settings of :class:`ForgetMeNot`, beside those of every trained method.

    ``attention_weight``, ``preserve_weight``, ``steer_weight``: of the three terms, set against one another as
    root-mean-square mass and mean squared noise, so that they carry over between models of any size.
    """

    attention_weight: float = 1.0
    steer_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_weight == 0 and self.steer_weight == 0:
            raise RequestError("With 'attention_weight' and 'steer_weight' both 0 nothing would be forgotten.")


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
        ),
        "tuned": ForgetMeNotSettings(),
    }

    def refuse(self, request: ForgetRequest, settings: ForgetMeNotSettings, inputs: Inputs) -> None:
        replaced = [concept.name for concept in request.concepts if concept.instead]
        if replaced and settings.steer_weight == 0:
            raise RequestError(
                f"Forget-Me-Not as published replaces nothing, and '{replaced[0]}' has a replacement: leave it out, "
                "set 'steer_weight' above 0, or use another preset or method."
            )
        if settings.attention_weight == 0 and len(replaced) < len(request.concepts):
            bare = next(concept.name for concept in request.concepts if not concept.instead)
            raise RequestError(
                f"With 'attention_weight' 0 nothing would make the model forget '{bare}': give a replacement."
            )

    def objective(
        self,
        material: Material,
        deltas: Deltas,
        request: ForgetRequest,
        settings: ForgetMeNotSettings,
        inputs: Inputs,
        progress: Progress | None,
    ) -> ForgetMeNotObjective:
        return ForgetMeNotObjective(material, deltas, settings)


class ForgetMeNotObjective(BaseObjective):
    """The terms of one step: METHODS §1's loss on a batch of the concept's prompts, and the two optional ones."""

    def __init__(self, material: Material, deltas: Deltas, settings: ForgetMeNotSettings) -> None:
        super().__init__(material, deltas)
        self.settings = settings

    def __call__(self, step: int) -> Terms:
        s, model = self.settings, self.model
        terms: dict[str, Term] = {}
        prompts = self.material.next_targets()
        batch = self.material.noised([prompt.concept for prompt in prompts])
        states = self.material.states([prompt.text for prompt in prompts])
        mask = token_mask([prompt.positions for prompt in prompts], states.hidden.shape[1], batch.x.device)
        # entered after the deltas were attached: what is recorded has them in it
        scale = 1.0
        with AttentionRecorder(model.survey) as recorder:
            predicted = model.predict_noise(batch.x, batch.times, states)
            if s.attention_weight:
                masses = recorder.masses(mask)
                terms["attention"] = Term(attention_resteering(masses), s.attention_weight)
                # the published norm grows with the root of their number, a mean does not: brought to one scale
                scale = sum(mass.numel() for mass in masses) ** 0.5
        steered = [i for i, prompt in enumerate(prompts) if prompt.instead is not None]
        if s.steer_weight and steered:
            texts = [prompts[i].instead or "" for i in steered]
            wanted = self.base(batch.x[steered], batch.times[steered], texts)
            terms["steer"] = Term(noise_matching(predicted[steered], wanted), scale * s.steer_weight)
        if self.material.kept:
            terms["preserve"] = self.preserve(scale * s.preserve_weight)
        return terms
