"""Attack with another model's first steps: the unedited model draws them, and the edited model the others.

The first steps decide what an image shows, and the edited model reads it from the latents, not from the prompt.
Whoever has the unedited model needs no attack; the result tells how much of the concept the edited model still draws.
"""

from __future__ import annotations

from ...models.sampling_start import Start
from ...progress import Progress
from ..drawing import Picture, Variant, draw_latents
from ..questions import seed_of
from .context import AttackContext, SearchResult

__all__ = ["completion"]

# of the sampler's steps
_SHARE = 0.2


def completion(context: AttackContext, progress: Progress | None = None) -> SearchResult:
    """Draw the first fifth of the steps of every image with the unedited model."""
    prompts, budget, sampling = context.target.prompts, context.budget, context.sampling
    first = max(1, round(_SHARE * sampling.steps))
    pictures = [
        Picture(prompts[i % len(prompts)], seed_of("attack", "completion", context.seed, i))
        for i in range(budget.pictures)
    ]
    latents = draw_latents(context.base or context.model, pictures, Variant(), sampling, progress, until=first)
    return SearchResult(prompts, context.model, start=Start(latents.cpu(), first, noised=False))
