"""Safe Latent Diffusion: guidance away from a concept while sampling, with no training and no patch.

Schramowski et al. 2023 (arXiv 2211.05105). Beside the prompt and the unconditional pass a third one is made under the
text of the concept, and where the prompt's prediction comes near it the picture is pushed off. It is a baseline: who
has the weights can leave it out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RequestError

__all__ = ["SAFETY", "SafetyGuidance", "SafetySettings", "safety_term"]


@dataclass(frozen=True)
class SafetySettings:
    """``scale`` is the paper's ``s_S``, ``threshold`` its ``λ``, ``momentum`` its ``s_m`` and ``beta`` its ``β_m``.

    ``warmup`` is ``δ`` as a share of all steps (the paper counts steps of 50): so long the term is built up and not
    used.
    """

    scale: float
    threshold: float
    warmup: float
    momentum: float
    beta: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale < 0:
            raise RequestError(f"The safety guidance's scale must be at least 0, not {self.scale}.")
        if math.isnan(self.threshold):
            raise RequestError("The safety guidance's threshold must be a number.")
        for name in ("warmup", "momentum", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise RequestError(f"The safety guidance's '{name}' must be 0 to 1, not {getattr(self, name)}.")

    def first_step(self, steps: int) -> int:
        """The first of ``steps`` steps, counted from 0, in which the term is used."""
        return round(self.warmup * steps)


# the four configurations of the paper; its warm-ups are 15, 10, 7 and 0 of 50 steps. (diffusers' weak scale is 20.)
SAFETY: dict[str, SafetySettings] = {
    "weak": SafetySettings(200.0, 0.0, 15 / 50, 0.0, 0.0),
    "medium": SafetySettings(1000.0, 0.01, 10 / 50, 0.3, 0.4),
    "strong": SafetySettings(2000.0, 0.025, 7 / 50, 0.5, 0.7),
    "max": SafetySettings(5000.0, 1.0, 0.0, 0.5, 0.7),
}


@dataclass(frozen=True)
class SafetyGuidance:
    """Which concept is steered away from, in words of a prompt, and how strongly (default: the paper's "medium")."""

    concept: str
    settings: SafetySettings = SAFETY["medium"]

    def __post_init__(self) -> None:
        if not self.concept.strip():
            raise RequestError("The safety guidance needs the concept in words: name what to steer away from.")

    @classmethod
    def named(cls, concept: str, configuration: str = "medium") -> SafetyGuidance:
        """With one of the published configurations. Raises :class:`RequestError` for an unknown name."""
        if configuration not in SAFETY:
            raise RequestError(
                f"The safety configuration '{configuration}' is not known: choose one of {', '.join(SAFETY)}."
            )
        return cls(concept, SAFETY[configuration])


def safety_term(
    conditional: Tensor, unconditional: Tensor, unsafe: Tensor, settings: SafetySettings, momentum: Tensor
) -> tuple[Tensor, Tensor]:
    """``γ_t``, which is taken from ``ε_θ(x_t, c_p) - ε_θ(x_t)`` before it is scaled (eq. 3), and ``ν_{t+1}``.

    With the predictions ``ε_p`` under the prompt, ``ε`` under none and ``ε_S`` under the concept, all like ``x_t``:
    ``φ = s_S (ε_p - ε_S)``; ``μ = min(1, |φ|)`` where ``ε_p - ε_S < λ``, element by element, and 0 elsewhere (eq. 6);
    ``γ_t = μ (ε_S - ε) + s_m ν_t`` (eq. 4, 7); ``ν_{t+1} = β_m ν_t + (1 - β_m) γ_t`` (eq. 8), from ``ν_0 = 0``. The
    paper prints a maximum in eq. 6; its authors' code and diffusers' take the minimum, as a bounded weight needs it.
    """
    apart = conditional - unsafe
    near = (settings.scale * apart).abs().clamp(max=1.0)
    weight = torch.where(apart < settings.threshold, near, torch.zeros_like(near))
    term = weight * (unsafe - unconditional) + settings.momentum * momentum
    return term, settings.beta * momentum + (1 - settings.beta) * term
