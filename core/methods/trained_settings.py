"""Settings that all trained methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import RequestError
from ..models.model_survey import PROJECTIONS
from ..prompts.everyday import CONTEXTS
from ..request.concept import check_templates, templates
from ..request.settings import check_settings, setting

__all__ = ["NoReplacement", "TrainedSettings"]

# what a concept without a replacement is mapped to: the same prompt without its name, with the phrases of
# `mean_phrases` in turn, or with the first of them
NoReplacement = Literal["dropped", "mean", "farthest"]


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
        "Projections of every cross-attention layer that are trained. Of a diffusion transformer, which has none, the "
        "layer that reads the text and the output and feed-forward layers of every block are.",
        choices=PROJECTIONS,
        group="training",
    )
    pooled: bool = setting(
        True,
        "Also train the layer that reads the whole prompt's vector, in models that have one (SDXL, Flux).",
        advanced=True,
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
    # only the first end-of-text token, not the padding, which has the same id in SD1
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
        check_templates(self.templates)
        if self.diverse and (self.forget_prompts or self.retain_prompts):
            raise RequestError("Give either 'diverse' or 'forget_prompts' and 'retain_prompts', not both.")

    def prompt_templates(self, kind: str) -> tuple[str, ...]:
        """The templates for concepts of a kind, with its everyday contexts if ``contexts`` is set."""
        found = self.templates or templates(kind)
        if self.one_template:
            return found[:1]
        return found + CONTEXTS[kind] if self.contexts and self.templates is None else found
