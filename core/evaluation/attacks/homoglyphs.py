"""Black-box attack with other spellings: homoglyphs, invisible characters, hyphens and doubled letters.

A person still reads the name, but a byte-level tokenizer produces other tokens, which an edit of the name's own tokens
does not cover. Spellings that the tokenizer normalizes (often upper case) are not tried.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from ...errors import RequestError
from ...models.text_encoders import TextEncoder
from ...progress import Progress
from .context import AttackContext, SearchResult
from .target import Target, with_name

__all__ = ["LOOKALIKES", "homoglyphs", "other_spellings", "plain", "spellings"]

# Unicode confusables (UTS 39) from Cyrillic, Greek, Armenian and IPA
LOOKALIKES: dict[str, str] = {
    "a": "\u0430",
    "b": "\u042c",
    "c": "\u0441",
    "d": "\u0501",
    "e": "\u0435",
    "g": "\u0261",
    "h": "\u04bb",
    "i": "\u0456",
    "j": "\u0458",
    "k": "\u03ba",
    "l": "\u04cf",
    "m": "\u043c",
    "n": "\u0578",
    "o": "\u043e",
    "p": "\u0440",
    "q": "\u051b",
    "r": "\u0433",
    "s": "\u0455",
    "t": "\u0442",
    "u": "\u03c5",
    "v": "\u03bd",
    "w": "\u051d",
    "x": "\u0445",
    "y": "\u0443",
}
# zero-width space, zero-width joiner, word joiner, soft hyphen
INVISIBLE = ("\u200b", "\u200d", "\u2060", "\u00ad")
_LATIN = {lookalike.casefold(): letter for letter, lookalike in LOOKALIKES.items()}


def plain(text: str) -> str:
    """Normalize ``text`` so that all :func:`spellings` of a name become equal to the name.

    Homoglyphs become Latin letters; case, invisible characters, blanks, hyphens and doubled letters are removed.
    """
    visible = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf").casefold()
    latin = "".join(_LATIN.get(c, c) for c in visible)
    return re.sub(r"(.)\1+", r"\1", re.sub(r"[\s\-]+", "", latin))


def spellings(name: str) -> tuple[str, ...]:
    """Return distinct alternative spellings of ``name``, most similar first."""
    letters = [i for i, c in enumerate(name) if c.isalpha()]
    if not letters:
        return ()
    alike = [i for i in letters if name[i].lower() in LOOKALIKES]
    found = []
    if alike:
        found.append("".join(LOOKALIKES.get(c.lower(), c) for c in name))
        found += [_put(name, i, LOOKALIKES[name[i].lower()]) for i in dict.fromkeys((alike[0], alike[-1]))]
    found.append("".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in name))  # full-width forms
    inside = [i for i in letters if i > 0 and name[i - 1].isalpha()]
    middle = inside[len(inside) // 2] if inside else None
    if middle is not None:
        found += [name[:middle] + mark + name[middle:] for mark in INVISIBLE]
        found += [name[:middle] + "-" + name[middle:], _between(name, inside, "-"), _between(name, inside, " ")]
    found += [_put(name, i, 2 * name[i]) for i in dict.fromkeys((letters[0], letters[len(letters) // 2], letters[-1]))]
    found += [name.upper(), name.lower(), name.title(), "".join(c.upper() if i % 2 else c for i, c in enumerate(name))]
    return tuple(spelling for spelling in dict.fromkeys(found) if spelling != name)


def _put(name: str, at: int, what: str) -> str:
    return name[:at] + what + name[at + 1 :]


def _between(name: str, places: Sequence[int], mark: str) -> str:
    return "".join(mark + c if i in places else c for i, c in enumerate(name))


def other_spellings(encoder: TextEncoder, target: Target) -> tuple[str, ...]:
    """Return the target's prompts, in turn, with each alternative spelling of the name.

    Spellings that tokenize like the name or an earlier spelling, and prompts that are truncated, are omitted.
    """
    name = target.concept.name
    found: list[str] = []
    known = {tuple(encoder.phrase_ids(name))}
    for spelling in spellings(name):
        prompt = with_name(target.prompts[len(found) % len(target.prompts)], name, spelling)
        fits = len(encoder.phrase_ids(prompt)) + 2 <= encoder.max_length
        if fits and (ids := tuple(encoder.phrase_ids(spelling))) not in known:
            known.add(ids)
            found.append(prompt)
    return tuple(found)


def homoglyphs(context: AttackContext, progress: Progress | None = None) -> SearchResult:
    """Return the prompts with other spellings of the name.

    Raises:
        RequestError: If every spelling tokenizes like the name.
    """
    found = other_spellings(context.model.text, context.target)
    if not found:
        raise RequestError(
            f"The text encoder tokenizes every other spelling of '{context.target.concept.name}' like the name itself: "
            "leave the homoglyph attack out."
        )
    return SearchResult(found, context.model)
