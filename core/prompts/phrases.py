"""Replacing a phrase in a prompt."""

from __future__ import annotations

import re

__all__ = ["replace_phrase"]


def replace_phrase(text: str, name: str, instead: str) -> str:
    """``text`` with ``instead`` said for ``name``; with nothing said for it, it is dropped, article and all.

    The article before it is made to fit (``a star`` → ``an arrow``).
    """
    whole = re.compile(rf"(?<!\w)(?:(?P<article>an?)(?P<gap>\s+))?{re.escape(name)}(?!\w)", re.IGNORECASE)

    def said(match: re.Match[str]) -> str:
        if not instead:
            return ""
        if match["article"] is None:
            return instead
        article = "an" if instead[0].lower() in "aeiou" else "a"
        return (article.capitalize() if match["article"][0].isupper() else article) + match["gap"] + instead

    return " ".join(whole.sub(said, text).split()) if not instead else whole.sub(said, text)
