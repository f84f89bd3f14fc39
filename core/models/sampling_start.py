"""Where sampling starts, if not from pure noise, and noise that is added on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

__all__ = ["ExtraNoise", "Start"]


@dataclass(frozen=True, eq=False)
class Start:
    """Latents to start from.

    Args:
        latents: ``(n, 4, h, w)``, one an image.
        first: Number of sampling steps to leave out at the beginning.
        noised: Whether noise of the first step's level is added to them: they are those of finished images. Otherwise
            they have this noise already.
        mask: ``(h, w)``, 1 where the image is drawn and 0 where that of ``latents`` is kept (inpainting); they must be
            those of finished images. ``None`` draws all of it.
    """

    latents: Tensor
    first: int = 0
    noised: bool = True
    mask: Tensor | None = None

    def rows(self, start: int, stop: int) -> Start:
        """The part of the latents from row ``start`` to before ``stop``."""
        return replace(self, latents=self.latents[start:stop])


@dataclass(frozen=True)
class ExtraNoise:
    """Noise of a DDIM sampler, added after every step but the last.

    Args:
        eta: Its standard deviation as a multiple of DDPM's: 0 is DDIM, 1 is DDPM.
        variance: Factor on its variance that the sampler does not compensate.

    Reference: Song et al. 2021, arXiv 2010.02502, eq. 12 and 16.
    """

    eta: float = 0.0
    variance: float = 1.0

    def deviation(self, now: tuple[float, float], after: tuple[float, float]) -> float:
        """The compensated noise of a step between two levels, each ``(signal, noise)``: at most all of its noise."""
        kept = (now[0] / after[0]) ** 2
        return min(self.eta * after[1] / now[1] * math.sqrt(1 - kept), after[1])
