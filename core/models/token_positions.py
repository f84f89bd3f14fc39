"""Token positions of a phrase in an encoded prompt.

A CLIP text encoder is causal: the state at a position depends on that token and the ones before it. So the concept is
in every state from its first token on, padding included (:func:`tail_positions`), and in none before.
"""

from __future__ import annotations

import re
import unicodedata

from ..errors import TokenError
from ..files.names import check_unicode
from .text_encoders import TextEncoder, words_from

__all__ = ["end_position", "phrase_span", "tail_positions", "token_positions"]


# words are runs of letters and digits, as in CLIP's own pre-tokenizer
_BEFORE, _AFTER = r"(?<![^\W_])", r"(?![^\W_])"


def _places(phrase: str, prompt: str) -> list[tuple[int, int]]:
    """Character spans ``(start, end)`` of the phrase in the prompt, as whole words."""
    words = phrase.split()
    pattern = r"\s+".join(re.escape(word) for word in words)
    pattern = (_BEFORE if words[0][0].isalnum() else "") + pattern + (_AFTER if words[-1][-1].isalnum() else "")
    return [match.span() for match in re.finditer(pattern, prompt, re.IGNORECASE)]


def _tokens_before(encoder: TextEncoder, prompt: str, end: int, ids: list[int]) -> int | None:
    """Number of tokens of ``prompt[:end]``, or ``None`` if a token of the prompt crosses ``end``."""
    # some tokenizers take a space for the beginning of the next word, others for a token of its own
    before = list(encoder.phrase_ids(prompt[:end].rstrip()))
    return len(before) if ids[: len(before)] == before else None


def _found(encoder: TextEncoder, phrase: str, prompt: str) -> list[tuple[int, int]]:
    """First position and number of sub-word tokens of every occurrence. Raises as the public functions do.

    Whole words are matched, not sub-word sequences, because a longer word may end in the phrase's sub-words.
    Punctuation that the tokenizer merges with the phrase's ends is included.
    """
    if not encoder.phrase_ids(phrase):
        raise TokenError(f"The phrase '{phrase}' has no tokens in this text encoder: use other words.")
    phrase, prompt = unicodedata.normalize("NFC", phrase), unicodedata.normalize("NFC", prompt)
    meant, encoded, ahead = list(encoder.phrase_ids(prompt)), encoder.token_ids(prompt), words_from(encoder)
    spans = []
    for first, after in _places(phrase, prompt):
        while (start := _tokens_before(encoder, prompt, first, meant)) is None and not prompt[first].isalnum():
            first -= 1
        while (end := _tokens_before(encoder, prompt, after, meant)) is None and not prompt[after - 1].isalnum():
            after += 1
        if start is None or end is None:
            continue  # inside a single token of this tokenizer
        # encoders truncate silently; tokens that are missing after encoding were cut off
        if list(encoded[ahead + start : ahead + end]) != meant[start:end]:
            raise TokenError(
                f"'{phrase}' is cut off in the prompt '{_short(prompt)}': the text encoder reads {encoder.max_length} "
                "tokens and no more; use a shorter prompt or a shorter name."
            )
        if end > start:
            spans.append((ahead + start, end - start))
    if not spans:
        raise TokenError(f"'{phrase}' does not occur in the prompt '{_short(prompt)}'.")
    return spans


def _short(prompt: str, limit: int = 80) -> str:
    return prompt if len(prompt) <= limit else prompt[: limit - 1] + "…"


def token_positions(encoder: TextEncoder, phrase: str, prompt: str) -> list[int]:
    """Return the positions, in the encoded sequence, of every sub-word token of every occurrence of a phrase.

    Raises :class:`TokenError` if the phrase does not occur in ``prompt``, or an occurrence is truncated.
    """
    positions = [start + offset for start, width in _found(encoder, phrase, prompt) for offset in range(width)]
    return list(dict.fromkeys(positions))


def phrase_span(encoder: TextEncoder, phrase: str, prompt: str) -> tuple[int, int]:
    """Return first position and token count of the first occurrence. Raises as :func:`token_positions`."""
    return _found(encoder, phrase, prompt)[0]


def tail_positions(encoder: TextEncoder, phrase: str, prompt: str) -> list[int]:
    """Return every position from the phrase's first token to the end of the sequence, padding included.

    In a causal encoder these are all positions whose state depends on the phrase. Raises as :func:`token_positions`.
    """
    start, _ = phrase_span(encoder, phrase, prompt)
    return list(range(start, len(encoder.token_ids(prompt))))


def end_position(encoder: TextEncoder, prompt: str) -> int:
    """Return the position of the *first* end-of-text token of ``prompt``.

    It is counted, not searched by id, because SD1 pads with the end-of-text token. Raises :class:`TokenError` if the
    prompt is truncated.
    """
    check_unicode(prompt, "The prompt")
    words, ahead = len(encoder.phrase_ids(prompt)), words_from(encoder)
    if ahead + words + 1 > encoder.max_length:
        raise TokenError(
            f"The prompt '{_short(prompt)}' has {words} tokens and is cut off: the text encoder reads "
            f"{encoder.max_length - ahead - 1} beside start and end."
        )
    return ahead + words
