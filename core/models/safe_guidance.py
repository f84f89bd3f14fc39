"""Safe Latent Diffusion: guidance away from a concept while sampling, without training or a patch.

Schramowski et al. 2023 (arXiv 2211.05105). A third pass under the concept's text accompanies the conditional and the
unconditional one; where the conditional prediction is close to it, the image is pushed away. This is a baseline:
anyone who has the weights can leave it out.
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
    """Settings of the safety term.

    Attributes:
        scale: ``s_S`` in the paper.
        threshold: ``λ`` in the paper.
        warmup: ``δ`` as a fraction of all steps (the paper counts steps out of 50). During the warm-up the momentum is
            accumulated but the term is not applied.
        momentum: ``s_m`` in the paper.
        beta: ``β_m`` in the paper.
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
        """First of ``steps`` steps (from 0) in which the term is applied."""
        return round(self.warmup * steps)


# the paper's four configurations; its warm-ups are 15, 10, 7 and 0 of 50 steps (diffusers' weak scale is 20)
SAFETY: dict[str, SafetySettings] = {
    "weak": SafetySettings(200.0, 0.0, 15 / 50, 0.0, 0.0),
    "medium": SafetySettings(1000.0, 0.01, 10 / 50, 0.3, 0.4),
    "strong": SafetySettings(2000.0, 0.025, 7 / 50, 0.5, 0.7),
    "max": SafetySettings(5000.0, 1.0, 0.0, 0.5, 0.7),
}


@dataclass(frozen=True)
class SafetyGuidance:
    """The concept to steer away from, as prompt text, and how strongly (default: the paper's "medium")."""

    concept: str
    settings: SafetySettings = SAFETY["medium"]

    def __post_init__(self) -> None:
        if not self.concept.strip():
            raise RequestError("The safety guidance needs the concept in words: name what to steer away from.")

    @classmethod
    def named(cls, concept: str, configuration: str = "medium") -> SafetyGuidance:
        """Create guidance with a published configuration. Raises :class:`RequestError` for an unknown name."""
        if configuration not in SAFETY:
            raise RequestError(
                f"The safety configuration '{configuration}' is not known: choose one of {', '.join(SAFETY)}."
            )
        return cls(concept, SAFETY[configuration])


def safety_term(
    conditional: Tensor, unconditional: Tensor, unsafe: Tensor, settings: SafetySettings, momentum: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the safety term ``γ_t`` and the next momentum ``ν_{t+1}``.

    ``γ_t`` is subtracted from ``ε_p - ε`` before the guidance scale is applied (eq. 3). With ``φ = s_S (ε_p - ε_S)``,
    ``μ = min(1, |φ|)`` where ``ε_p - ε_S < λ`` element by element, 0 elsewhere (eq. 6):
    ``γ_t = μ (ε_S - ε) + s_m ν_t`` (eq. 4, 7) and ``ν_{t+1} = β_m ν_t + (1 - β_m) γ_t`` (eq. 8), ``ν_0 = 0``. The paper
    prints a maximum in eq. 6; the authors' code and diffusers use the minimum, which a bounded weight requires.

    Args:
        conditional: Noise prediction ``ε_p`` under the prompt, like ``x_t``.
        unconditional: Noise prediction ``ε`` without a prompt, like ``x_t``.
        unsafe: Noise prediction ``ε_S`` under the concept, like ``x_t``.
        settings: Settings of the term.
        momentum: ``ν_t``, like ``x_t``.

    Reference:
        Schramowski et al., *Safe Latent Diffusion* (arXiv 2211.05105), eq. 3 to 8.
    """
    apart = conditional - unsafe
    near = (settings.scale * apart).abs().clamp(max=1.0)
    weight = torch.where(apart < settings.threshold, near, torch.zeros_like(near))
    term = weight * (unsafe - unconditional) + settings.momentum * momentum
    return term, settings.beta * momentum + (1 - settings.beta) * term
