"""White-box attack with a soft prompt: learned vectors before the concept's own prompt.

The prefix of P4D and UnlearnDiffAtk (arXiv 2309.06135; arXiv 2310.11868) as free input embeddings ``v`` of the text
encoder, which minimize ``E ‖ε - ε_θ'(x_t, t, c([v; prompt]))‖²`` on images of the concept, with gradients through the
patched model ``θ'``. The name stays in the prompt, so the attack tests whether a perturbation undoes the edit of *that*
name; :mod:`.inversion_recall` tests whether any embedding still reaches the concept.
"""

from __future__ import annotations

from ...progress import Progress
from ...training.textual_inversion import PLACEHOLDER, InversionSettings, invert, with_vectors
from .context import AttackContext, SearchResult

__all__ = ["soft_prompt"]


def soft_prompt(context: AttackContext, progress: Progress | None = None) -> SearchResult:
    """Learn vectors to prepend to the target's prompts. Raises as :func:`invert`."""
    _ = context.clip  # raises ModelError for other text encoders
    budget = context.budget
    templates = tuple(f"{{}} {prompt}" for prompt in context.target.prompts)
    settings = InversionSettings(
        budget.vectors, budget.steps, context.stride, batch_size=budget.batch, templates=templates
    )
    with context.edited():
        vectors = invert(context.model, context.latents, settings, context.seed, progress, workspace=context.workspace)
    prompts = tuple(template.format(PLACEHOLDER) for template in templates)
    reading = with_vectors(context.model, {PLACEHOLDER: vectors})
    return SearchResult(prompts, reading, budget.steps, budget.steps * budget.batch)
