"""Adapter from a webui's text encoder to the core's: the host's own encode path, with prompt syntax escaped."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ..core.errors import ModelError, TokenError
from ..core.models.text_encoders import TextStates
from ..core.models.unet import UNetSurvey

__all__ = ["WebText", "literal"]

_SYNTAX = re.compile(r"([\\()\[\]])")
_ESCAPED = re.compile(r"\\([\\()\[\]])")


def literal(text: str) -> str:
    """Escape prompt syntax: brackets are not emphasis, and ``BREAK`` does not start a new section.

    Brackets that are escaped already stay as they are.
    """
    escaped = _SYNTAX.sub(r"\\\1", _ESCAPED.sub(r"\1", text))
    # the tokenizers of these models ignore case, the syntax does not
    return re.sub(r"\bBREAK\b", "break", escaped)


class WebText:
    """A webui's text encoder as the core's. Only the first section of 77 tokens is used.

    Args:
        engine: The host's chunking encoder; the first one if there are two.
        embeddings: The host's database of textual inversions.
        encode: Encodes prompts to states ``(n, 77·sections, d)`` and pooled vectors ``(n, d)`` or ``None``.
        layer: Which hidden states are used, in the core's notation.
        plain: Whether the host's prompt syntax is disabled.
    """

    max_length = 77
    _AT_ONCE = 32

    def __init__(
        self,
        engine: Any,
        embeddings: Any,
        encode: Callable[[list[str]], tuple[Any, Any]],
        layer: str,
        plain: bool = False,
    ) -> None:
        self.layer = layer
        self._engine, self._embeddings, self._encode, self._plain = engine, embeddings, encode, plain

    def check_fits(self, found: UNetSurvey) -> None:
        """Check that the states have the width that a UNet expects.

        Raises:
            ModelError: If they do not.
        """
        width = self.encode([""]).hidden.shape[-1]
        if width != found.context_dim:
            raise ModelError(
                f"The text encoder returns states of width {width}, but the UNet expects {found.context_dim}: load "
                "another checkpoint, as this one is not supported here."
            )

    def _prompt(self, text: str) -> str:
        return text if self._plain else literal(text)

    def phrase_ids(self, phrase: str) -> list[int]:
        text = phrase if self._plain else _ESCAPED.sub(r"\1", phrase)
        ids = [int(token) for token in self._engine.tokenize([text])[0]]
        for at in range(len(ids)):
            embedding, _ = self._embeddings.find_embedding_at_position(ids, at)
            if embedding is not None:
                raise TokenError(
                    f"'{embedding.name}' is the name of a textual inversion, which the webui replaces by its vectors: "
                    "use other words, or move the file out of the embeddings folder."
                )
        return ids

    def token_ids(self, prompt: str) -> list[int]:
        self.phrase_ids(prompt)
        ids = [int(token) for token in self._engine.tokenize_line(self._prompt(prompt))[0][0].tokens]
        if self._engine.id_pad != self._engine.id_end:
            end = ids.index(self._engine.id_end)
            ids[end + 1 :] = [self._engine.id_pad] * (len(ids) - end - 1)
        return ids

    def encode(self, prompts: Sequence[str]) -> TextStates:
        for prompt in prompts:
            self.phrase_ids(prompt)
        found = []
        for i in range(0, len(prompts), self._AT_ONCE):
            states, pooled = self._encode([self._prompt(prompt) for prompt in prompts[i : i + self._AT_ONCE]])
            # cloned outside of inference mode, it is an ordinary tensor
            first = states[:, : self.max_length].clone()
            found.append(TextStates(first, None if pooled is None else pooled.clone()))
        return TextStates.cat(found)
