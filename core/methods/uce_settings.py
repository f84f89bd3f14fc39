"""Settings of the closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..models.model_survey import TEXT_PROJECTIONS
from ..request.concept import check_templates
from ..request.settings import check_settings, setting

__all__ = ["UCESettings"]


@dataclass(frozen=True)
class UCESettings:
    """Settings of :class:`UCE`: ``erase_weight`` is ``s_e``, ``preserve_weight`` is ``s_p`` and ``ridge`` is ``λ``."""

    # in a causal encoder every later position carries the concept
    columns: Literal["tail", "last"] = setting(
        "tail",
        "Token positions that are edited. tail: every position from the concept's first token on. last: only its last "
        "token, as published.",
        group="prompts",
    )
    projections: tuple[str, ...] = setting(
        TEXT_PROJECTIONS, "Projections that read the text and are edited.", choices=TEXT_PROJECTIONS, advanced=True
    )
    erase_weight: float = setting(1.0, "Weight of each text state to forget.", minimum=0.01, maximum=1000, step=0.05)
    preserve_weight: float = setting(1.0, "Weight of each text state to preserve.", minimum=0, maximum=1000, step=0.05)
    # relative, so that one value fits every text encoder
    ridge: float = setting(
        0.01,
        "Regularization towards the unchanged weights, relative to the size of the text states: more changes less.",
        minimum=0.0001,
        maximum=1000,
    )
    contexts: bool = setting(
        False,
        "Also use the concept in everyday contexts, next to colours, styles and backgrounds.",
        group="prompts",
    )
    # concepts outside the retain set may be affected
    keep_common: bool = setting(
        False, "Also preserve everyday words, in addition to the preserve list.", group="prompts"
    )
    rank: int | None = setting(
        None,
        "Maximum rank of the patch; 0: as many as the tolerance keeps.",
        minimum=1,
        maximum=1024,
        none_value=0,
        leading=True,
    )
    tolerance: float = setting(
        1e-6,
        "Singular values below this share of the largest are dropped.",
        minimum=0,
        maximum=0.999,
        step=1e-6,
    )
    templates: tuple[str, ...] | None = setting(
        None,
        "Prompts with {} in the concept's place, one per line; empty: those of the concept's kind.",
        advanced=True,
        group="prompts",
    )
    preserve_prompts: tuple[str, ...] = setting((), "Whole prompts to preserve, one per line.", group="prompts")
    no_replacement: Literal["dropped", "empty", "mean"] = setting(
        "dropped",
        "What a concept without a replacement is mapped to. dropped: the same prompt without it. empty: the empty "
        "prompt. mean: the mean of the same prompt with the four preserved phrases, or everyday words of its kind, "
        "that are farthest from it.",
        group="prompts",
    )
    neutral_object: str = setting(
        "",
        "What an object without a replacement is mapped to; empty: as no_replacement says.",
        advanced=True,
        group="prompts",
    )
    neutral_style: str = setting(
        "",
        "What a style without a replacement is mapped to; empty: as no_replacement says.",
        advanced=True,
        group="prompts",
    )
    neutral_identity: str = setting(
        "",
        "What a person without a replacement is mapped to; empty: as no_replacement says.",
        advanced=True,
        group="prompts",
    )

    pooled: bool = setting(
        True, "Also edit what the model reads from the whole prompt's vector, if it reads one (SDXL).", advanced=True
    )
    # a LoRA is linear in its strength, and people apply one at less than 1; regularization also stops short
    overshoot: float = setting(
        1.0,
        "How far each text state is moved, as a multiple of the way to what it is mapped to. Above 1 the concept is "
        "gone at a strength below 1 too.",
        minimum=0.1,
        maximum=3,
        step=0.05,
        advanced=True,
    )

    # regularization stops short of the mean, and pictures near it can still show the concept; chosen on Hugo Marsh
    overshoot_mean: float = setting(
        1.8,
        "The overshoot of concepts that are mapped to a mean, because they have no replacement.",
        minimum=0.1,
        maximum=3,
        step=0.05,
        advanced=True,
    )

    # regularization stops shorter of people than of styles, and at a strength below 1 a person was still drawn; chosen
    # on Hugo Marsh
    reach: float | None = setting(
        None,
        "Minimum share of the way that a concept is moved in the end, unless it is mapped to a mean: where "
        "regularization leaves less, its overshoot is raised, up to 3; 0: off.",
        minimum=0.01,
        maximum=2,
        step=0.05,
        none_value=0,
        advanced=True,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        check_templates(self.templates)
