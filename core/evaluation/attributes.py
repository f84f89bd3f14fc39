"""Detection of attributes that the probe has no label for (hat, balloon, the pilot's hair) by their colour.

In images of the embedded world without a style, each attribute has a colour that occurs nowhere else near it. A test
checks this on rendered images with known attributes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ATTRIBUTE_CUES", "ColourCue", "shows_attribute"]


@dataclass(frozen=True)
class ColourCue:
    """A colour that identifies an attribute in the upper part of a 128 × 128 image.

    Args:
        colour: 8-bit red, green and blue.
        height: Fraction of the image height that is searched, from the top.
        pixels: Minimum number of matching pixels.
        reach: Maximum Euclidean distance of a matching pixel from ``colour``, in 8-bit RGB.
    """

    colour: tuple[int, int, int]
    height: float
    pixels: int
    reach: float = 45.0

    def detect(self, images: Tensor) -> Tensor:
        """Return whether each of ``images`` ``(n, 3, 128, 128)`` in [-1, 1] shows the attribute: ``(n,)``, bool."""
        upper = (images[:, :, : round(self.height * images.shape[2])].float() + 1) * 127.5
        colour = torch.tensor(self.colour, dtype=torch.float32, device=images.device).view(1, 3, 1, 1)
        near = torch.linalg.vector_norm(upper - colour, dim=1) < self.reach
        shown: Tensor = near.flatten(1).sum(1) >= self.pixels
        return shown


ATTRIBUTE_CUES: dict[str, ColourCue] = {
    "hat": ColourCue((110, 60, 150), 0.4, 380),
    "balloon": ColourCue((30, 190, 200), 0.6, 350),
    # the pilot's short brown hair; the long-haired variant has no pixel of this colour
    "short hair": ColourCue((92, 70, 50), 0.6, 160),
}


def shows_attribute(attribute: str, images: Tensor) -> list[bool]:
    """Return whether each image ``(n, 3, 128, 128)`` in [-1, 1] shows an attribute of :data:`ATTRIBUTE_CUES`."""
    return ATTRIBUTE_CUES[attribute].detect(images).tolist()
