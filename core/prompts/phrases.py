"""Replacing a phrase in a prompt."""

from __future__ import annotations

import re

__all__ = ["replace_phrase"]


def replace_phrase(text: str, name: str, replacement: str) -> str:
    """Replace every whole-word occurrence of a phrase in a prompt, whatever its case.

    Args:
        text: The prompt.
        name: The phrase.
        replacement: The new phrase; its article is adapted (``a star`` → ``an arrow``). Empty: ``name`` is dropped
            with its article.
    """
    whole = re.compile(rf"(?<!\w)(?:(?P<article>an?)(?P<gap>\s+))?{re.escape(name)}(?!\w)", re.IGNORECASE)

    def replaced(match: re.Match[str]) -> str:
        if not replacement:
            return ""
        if match["article"] is None:
            return replacement
        article = "an" if replacement[0].lower() in "aeiou" else "a"
        return (article.capitalize() if match["article"][0].isupper() else article) + match["gap"] + replacement

    found = whole.sub(replaced, text)
    return found if replacement else " ".join(found.split())
