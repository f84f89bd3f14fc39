"""Adapter from a webui's text encoder to the core's: the host's own encode path, with prompt syntax escaped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..core.errors import ModelError
from ..core.models.model_survey import ModelSurvey
from ..core.models.text_cache import TOKENIZER_PROBE, fingerprint
from ..core.models.text_states import TextStates

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


@contextmanager
def _without(embeddings: Any) -> Iterator[None]:
    """Inside a ``with`` block, a database of textual inversions finds none.

    The database itself stays as it is, because the page may reload or list it at the same time.
    """
    embeddings.find_embedding_at_position = lambda tokens, offset: (None, None)
    try:
        yield
    finally:
        del embeddings.find_embedding_at_position


class WebText:
    """A webui's text encoder as the core's. Only the first section of 77 tokens is used.

    Every prompt is read as words: a word that is also the name of a textual inversion keeps its meaning in prompts that
    no person wrote. :meth:`reserved` finds such names in what a person wrote, where the word would mean the vectors.

    Args:
        engine: The host's chunking encoder; the first one if there are two.
        embeddings: The host's databases of textual inversions, one for each encoder that has its own.
        encode: Encodes prompts to states ``(n, 77·sections, d)`` and pooled vectors ``(n, d)`` or ``None``.
        modules: The modules whose weights the states come from.
        layer: Which hidden states are used, in the core's notation.
        plain: Whether the host's prompt syntax is disabled.
    """

    max_length = 77
    _AT_ONCE = 32

    def __init__(
        self,
        engine: Any,
        embeddings: Sequence[Any],
        encode: Callable[[list[str]], tuple[Any, Any]],
        modules: Sequence[nn.Module],
        layer: str,
        plain: bool = False,
    ) -> None:
        self.layer, self._modules = layer, list(modules)
        self._engine, self._encode, self._plain = engine, encode, plain
        self._embeddings = list({id(one): one for one in embeddings}.values())

    def modules(self) -> list[nn.Module]:
        """The modules whose weights the states come from."""
        return self._modules

    def fingerprint(self) -> str | None:
        """What the states depend on besides the prompt (``core.models.text_cache.cache_of``)."""
        # the host changes and moves weights, such as those of a LoRA, only when it encodes
        self.encode([""])
        return fingerprint(self._modules, self.layer, self._plain, self.token_ids(TOKENIZER_PROBE))

    def check_fits(self, found: ModelSurvey) -> None:
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

    @contextmanager
    def _words_only(self) -> Iterator[None]:
        with ExitStack() as stack:
            for embeddings in self._embeddings:
                stack.enter_context(_without(embeddings))
            yield

    def reserved(self, phrase: str) -> str | None:
        """The name of the first textual inversion that a phrase calls in a prompt, or ``None``."""
        ids = self.phrase_ids(phrase)
        for embeddings in self._embeddings:
            for at in range(len(ids)):
                embedding, _ = embeddings.find_embedding_at_position(ids, at)
                if embedding is not None:
                    return str(embedding.name)
        return None

    def phrase_ids(self, phrase: str) -> list[int]:
        text = phrase if self._plain else _ESCAPED.sub(r"\1", phrase)
        return [int(token) for token in self._engine.tokenize([text])[0]]

    def token_ids(self, prompt: str) -> list[int]:
        with self._words_only():
            ids = [int(token) for token in self._engine.tokenize_line(self._prompt(prompt))[0][0].tokens]
        if self._engine.id_pad != self._engine.id_end:
            end = ids.index(self._engine.id_end)
            ids[end + 1 :] = [self._engine.id_pad] * (len(ids) - end - 1)
        return ids

    def encode(self, prompts: Sequence[str]) -> TextStates:
        found = []
        for i in range(0, len(prompts), self._AT_ONCE):
            with self._words_only():
                states, pooled = self._encode([self._prompt(prompt) for prompt in prompts[i : i + self._AT_ONCE]])
            # cloned outside of inference mode, it is an ordinary tensor
            first = states[:, : self.max_length].clone()
            found.append(TextStates(first, None if pooled is None else pooled.clone()))
        return TextStates.cat(found)
