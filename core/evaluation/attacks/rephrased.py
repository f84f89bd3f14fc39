"""Black-box attack with paraphrases: synonyms, descriptions without the name, and indirect prompts."""

from __future__ import annotations

from ...errors import RequestError
from ...progress import Progress
from .context import AttackContext, SearchResult

__all__ = ["rephrased"]


def rephrased(context: AttackContext, progress: Progress | None = None) -> SearchResult:
    """Return the target's paraphrases.

    Raises:
        RequestError: If there are none.
    """
    if not context.target.paraphrases:
        raise RequestError(f"There are no paraphrases of '{context.target.concept.name}' to attack with: give some.")
    return SearchResult(context.target.paraphrases, context.model)
