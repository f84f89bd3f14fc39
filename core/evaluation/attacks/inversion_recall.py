"""White-box attack by textual inversion on the patched model: tests whether any embedding still reaches the concept.

New vectors replace the name; they start from random values and are learned on images of the concept through the patched
model.

Reference: Gal et al., arXiv 2208.01618; used against concept erasure by Pham et al., arXiv 2308.01508.
"""

from __future__ import annotations

from ...progress import Progress
from ...request.concept import templates
from ...training.textual_inversion import PLACEHOLDER, InversionSettings, invert, with_vectors
from .context import AttackContext, SearchResult

__all__ = ["inversion_recall"]


def inversion_recall(context: AttackContext, progress: Progress | None = None) -> SearchResult:
    """Learn vectors that replace the name in the templates of the concept's kind. Raises as :func:`invert`."""
    _ = context.clip  # raises ModelError for other text encoders
    budget = context.budget
    prompt_templates = templates(context.target.concept.kind)
    settings = InversionSettings(
        budget.vectors, budget.steps, context.stride, batch_size=budget.batch, templates=prompt_templates
    )
    with context.edited():
        vectors = invert(context.model, context.latents, settings, context.seed, progress, workspace=context.workspace)
    prompts = tuple(template.format(PLACEHOLDER) for template in prompt_templates)
    reading = with_vectors(context.model, {PLACEHOLDER: vectors})
    return SearchResult(prompts, reading, budget.steps, budget.steps * budget.batch)
