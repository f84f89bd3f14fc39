r"""Prompt syntax in the words of a request: what hosts read as more than words is refused, in every front end alike.

A request names things, and a method reads its words literally. Emphasis, ``BREAK``, LoRA tags and wildcards mean
something else to the host that the words were copied from, so an edit of the literal text would be another one than
was meant. Round and square brackets that are only a part of a name stay legitimate, as in ``saber_(fate)``, and may be
escaped as in a prompt, ``saber_\(fate\)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import RequestError
from .concept import unescaped

__all__ = ["check_no_syntax", "plain_words"]


@dataclass(frozen=True)
class _Syntax:
    """One kind of prompt syntax: how it is found, what it is, and the words that it stands for."""

    pattern: re.Pattern[str]
    about: str
    plain: Callable[[re.Match[str]], str]


def _inner(match: re.Match[str]) -> str:
    return match["words"].rstrip()


def _bracketed(match: re.Match[str]) -> str:
    return next((words for words in match.groups() if words), "")


def _first_choice(match: re.Match[str]) -> str:
    return next((part for part in re.split(r"[|:]", match[0].strip("[{}]")) if part.strip()), " ")


# what is longer is refused by every text encoder; the patterns take quadratic time on many brackets
_LONGEST = 2000
# a number as Python's float() reads it, which is how hosts read a weight
_NUMBER = r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_KINDS = (
    _Syntax(
        re.compile(r"<\w+:[^<>]*>"),
        "a tag that puts in an extra network, such as a LoRA",
        lambda match: " ",
    ),
    _Syntax(
        re.compile(r"(?<![^\W_])embedding:[^\s()]*", re.IGNORECASE),
        "a textual inversion in ComfyUI",
        lambda match: " ",
    ),
    _Syntax(
        re.compile(r"__(?=[^\s_])\S*?(?<=[^\s_])__"),
        "a wildcard, which is replaced by a random line of a file",
        lambda match: " ",
    ),
    _Syntax(
        # a list splits at commas, so that the second bracket may be missing
        re.compile(r"\{[^{}]*\|[^{}]*\}?"),
        "a random choice",
        _first_choice,
    ),
    _Syntax(
        re.compile(r"\((?P<words>[^()\[\]]*?)\s*:\s*" + _NUMBER + r"\s*\)", re.IGNORECASE),
        "words with a weight",
        _inner,
    ),
    _Syntax(
        re.compile(r"\[[^\[\]]*[|:][^\[\]]*\]"),
        "words that change while a picture is made",
        _first_choice,
    ),
    _Syntax(
        re.compile(r"(?P<words>[^()\[\]:]*):\s*" + _NUMBER + r"\s*[)\]]", re.IGNORECASE),
        "words with a weight",
        _inner,
    ),
    _Syntax(
        re.compile(
            r"\((?:\s*\()+([^()]*)(?:\)\s*)+\)|\[(?:\s*\[)+([^\[\]]*)(?:\]\s*)+\]|\{(?:\s*\{)+([^{}]*)(?:\}\s*)+\}"
        ),
        "words with emphasis",
        _bracketed,
    ),
    _Syntax(
        re.compile(r"^\s*(?:\(([^()]*)\)|\[([^\[\]]*)\]|\{([^{}]*)\})\s*$"),
        "words with emphasis",
        _bracketed,
    ),
    _Syntax(
        re.compile(r"\b(?:AND|BREAK)\b"),
        "in capital letters a command to the host, which divides the prompt there",
        lambda match: match[0].lower(),
    ),
)


def _found(text: str) -> tuple[_Syntax, re.Match[str]] | None:
    return next(((kind, match) for kind in _KINDS if (match := kind.pattern.search(text)) is not None), None)


def plain_words(text: str) -> str:
    """``text`` without prompt syntax: the words that it stands for; empty where there are none."""
    text = unescaped(text)[:_LONGEST]
    # every replacement is shorter, or has fewer capital letters
    while (found := _found(text)) is not None:
        kind, match = found
        text = text[: match.start()] + kind.plain(match) + text[match.end() :]
    return " ".join(text.split())


def check_no_syntax(text: str, where: str) -> None:
    """Check that words a person wrote into a request have no prompt syntax.

    Args:
        text: The words.
        where: The input, to begin a sentence, such as "The concept".

    Raises:
        RequestError: Names the input, the syntax, and what to write instead.
    """
    found = _found(unescaped(text)[:_LONGEST])
    if found is None:
        return
    kind, match = found
    part = match[0].strip()
    whole = f"{where} '{text}' " + ("is" if part == text.strip() else f"contains '{part}', which is")
    words = plain_words(text)
    instead = f"write '{words}'" if words else "write in words what it shows"
    raise RequestError(f"{whole} {kind.about}: a request takes words alone, so {instead}.")
