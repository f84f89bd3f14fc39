"""Token positions of a phrase in an encoded prompt."""

from __future__ import annotations

import re
import unicodedata

from ..errors import TokenError
from .text_encoders import TextEncoder

__all__ = ["end_position", "phrase_span", "tail_positions", "token_positions"]


# letters and digits make words; everything else separates them, as in CLIP's own splitting
_BEFORE, _AFTER = r"(?<![^\W_])", r"(?![^\W_])"


def _places(phrase: str, prompt: str) -> list[tuple[int, int]]:
    """Where the phrase stands in the prompt as words of its own: first character and the one after the last."""
    words = phrase.split()
    pattern = r"\s+".join(re.escape(word) for word in words)
    pattern = (_BEFORE if words[0][0].isalnum() else "") + pattern + (_AFTER if words[-1][-1].isalnum() else "")
    return [match.span() for match in re.finditer(pattern, prompt, re.IGNORECASE)]


def _tokens_before(encoder: TextEncoder, prompt: str, end: int, ids: list[int]) -> int | None:
    """How many of the prompt's tokens its first characters make; ``None`` where one token reaches over their end."""
    before = list(encoder.phrase_ids(prompt[:end]))
    return len(before) if ids[: len(before)] == before else None


def _found(encoder: TextEncoder, phrase: str, prompt: str) -> list[tuple[int, int]]:
    """First position and number of sub-words of every occurrence; the errors of the public functions.

    Looked for in the words, not in the sub-words: a longer word may end in the very sub-words of the phrase. Where a
    tokenizer merges punctuation at the phrase's ends with what touches it, that is taken in.
    """
    if not encoder.phrase_ids(phrase):
        raise TokenError(f"The phrase '{phrase}' has no tokens in this text encoder: use other words for it.")
    phrase, prompt = unicodedata.normalize("NFC", phrase), unicodedata.normalize("NFC", prompt)
    meant, encoded = list(encoder.phrase_ids(prompt)), encoder.token_ids(prompt)
    spans = []
    for first, after in _places(phrase, prompt):
        while (start := _tokens_before(encoder, prompt, first, meant)) is None and not prompt[first].isalnum():
            first -= 1
        while (end := _tokens_before(encoder, prompt, after, meant)) is None and not prompt[after - 1].isalnum():
            after += 1
        if start is None or end is None:
            continue  # the inside of what is one word to this tokenizer
        # an encoder cuts a prompt off silently; what is there before the cut and not after it was lost
        if list(encoded[1 + start : 1 + end]) != meant[start:end]:
            raise TokenError(
                f"'{phrase}' is cut off in the prompt '{_short(prompt)}': the text encoder reads {encoder.max_length} "
                "tokens and no more; use a shorter prompt or a shorter name."
            )
        if end > start:
            spans.append((1 + start, end - start))
    if not spans:
        raise TokenError(f"'{phrase}' does not occur in the prompt '{_short(prompt)}'.")
    return spans


def _short(prompt: str, limit: int = 80) -> str:
    return prompt if len(prompt) <= limit else prompt[: limit - 1] + "…"


def token_positions(encoder: TextEncoder, phrase: str, prompt: str) -> list[int]:
    """Positions, in the encoded sequence, of every sub-word of every occurrence of ``phrase`` in ``prompt``.

    Raises :class:`TokenError` where the phrase does not occur or an occurrence is cut off at the encoder's length.
    """
    positions = [start + offset for start, width in _found(encoder, phrase, prompt) for offset in range(width)]
    return list(dict.fromkeys(positions))


def phrase_span(encoder: TextEncoder, phrase: str, prompt: str) -> tuple[int, int]:
    """First position and number of sub-words of the first occurrence. Raises as :func:`token_positions`."""
    return _found(encoder, phrase, prompt)[0]


def tail_positions(encoder: TextEncoder, phrase: str, prompt: str) -> list[int]:
    """Every position from the phrase's first token to the end of the sequence, padding included.

    In a causal encoder these are all the positions whose state the phrase has touched. Raises as
    :func:`token_positions`.
    """
    start, _ = phrase_span(encoder, phrase, prompt)
    return list(range(start, len(encoder.token_ids(prompt))))


def end_position(encoder: TextEncoder, prompt: str) -> int:
    """Position of the *first* end-of-text token of ``prompt``.

    Counted, not searched by id: SD1's end-of-text is also its padding, so the id alone flags every pad. Raises
    :class:`TokenError` where the prompt is cut off, since the end is then not the prompt's own.
    """
    words = len(encoder.phrase_ids(prompt))
    if words + 2 > encoder.max_length:
        raise TokenError(
            f"The prompt '{_short(prompt)}' has {words} tokens and is cut off: the text encoder reads "
            f"{encoder.max_length - 2} beside start and end."
        )
    return words + 1
