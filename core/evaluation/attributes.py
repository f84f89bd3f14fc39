"""What the probe has no label for: a hat, a balloon, a pilot's hair, told by their own colours where they belong.

Each has a colour that nothing else near it has, in pictures of the embedded world without a style. A test holds this to
drawn pictures whose attributes are known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ATTRIBUTE_CUES", "ColourCue", "shows_attribute"]


@dataclass(frozen=True)
class ColourCue:
    """At least ``pixels`` of a 128 × 128 picture's upper part (``height``, a share) lie within ``reach`` of a colour.

    ``colour`` is 8-bit red, green and blue, ``reach`` a Euclidean distance among these.
    """

    colour: tuple[int, int, int]
    height: float
    pixels: int
    reach: float = 45.0

    def detect(self, images: Tensor) -> Tensor:
        """Whether each of ``images`` ``(n, 3, 128, 128)`` in [-1, 1] shows it: ``(n,)``, boolean."""
        upper = (images[:, :, : round(self.height * images.shape[2])].float() + 1) * 127.5
        wanted = torch.tensor(self.colour, dtype=torch.float32, device=images.device).view(1, 3, 1, 1)
        near = torch.linalg.vector_norm(upper - wanted, dim=1) < self.reach
        shown: Tensor = near.flatten(1).sum(1) >= self.pixels
        return shown


ATTRIBUTE_CUES: dict[str, ColourCue] = {
    "hat": ColourCue((110, 60, 150), 0.4, 380),
    "balloon": ColourCue((30, 190, 200), 0.6, 350),
    # the pilot's brown cap of hair; one with long hair has none of it
    "short hair": ColourCue((92, 70, 50), 0.6, 160),
}


def shows_attribute(attribute: str, images: Tensor) -> list[bool]:
    """Whether each picture shows one of :data:`ATTRIBUTE_CUES`."""
    return ATTRIBUTE_CUES[attribute].detect(images).tolist()
