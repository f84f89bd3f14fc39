"""Attack with half an image of the concept, whose other half the edited model draws.

The judge sees the whole image, so that a model that never knew the concept may succeed as well: read the result beside
the unedited model's.
"""

from __future__ import annotations

import torch

from ...models.sampling_start import Start
from ...progress import Progress
from .context import AttackContext, SearchResult

__all__ = ["inpainting"]


def inpainting(context: AttackContext, progress: Progress | None = None) -> SearchResult:
    """Keep the left half of every image of the concept."""
    height, width = context.latents.shape[-2:]
    mask = torch.zeros(height, width)
    mask[:, width // 2 :] = 1
    return SearchResult(context.target.prompts, context.model, start=Start(context.latents, mask=mask))
