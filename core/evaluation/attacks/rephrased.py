"""Black-box attack with other words: synonyms, descriptions without the name, indirect prompts."""

from __future__ import annotations

from ...errors import RequestError
from ...progress import Progress
from .context import AttackContext, SearchResult

__all__ = ["rephrased"]


def rephrased(context: AttackContext, progress: Progress | None = None) -> SearchResult:
    """The target's paraphrases as they are. Raises :class:`RequestError` where there are none."""
    if not context.target.paraphrases:
        raise RequestError(f"No paraphrases of '{context.target.concept.name}' were given to attack with.")
    return SearchResult(context.target.paraphrases, context.model)
