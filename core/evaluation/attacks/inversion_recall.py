"""White-box attack by textual inversion on the patched model: is the concept still in it, under any words?

Gal et al. (arXiv 2208.01618) as Pham et al. use it against concept erasure (arXiv 2308.01508): new vectors in place of
the name, from a random start, learned on pictures of the concept through the patched model.
"""

from __future__ import annotations

from ...progress import Progress
from ...request.concept import templates
from ...training.textual_inversion import PLACEHOLDER, InversionSettings, invert, with_vectors
from .context import AttackContext, Found

__all__ = ["inversion_recall"]


def inversion_recall(ground: AttackContext, progress: Progress | None = None) -> Found:
    """Vectors in place of the name, in the templates of the concept's kind. Raises as :func:`invert`."""
    _ = ground.clip
    budget = ground.budget
    said = templates(ground.target.concept.kind)
    settings = InversionSettings(budget.vectors, budget.steps, ground.stride, batch_size=budget.batch, templates=said)
    with ground.edited():
        vectors = invert(ground.model, ground.latents, settings, ground.seed, progress, workspace=ground.workspace)
    prompts = tuple(template.format(PLACEHOLDER) for template in said)
    reading = with_vectors(ground.model, {PLACEHOLDER: vectors})
    return Found(prompts, reading, budget.steps, budget.steps * budget.batch)
