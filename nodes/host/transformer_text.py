"""Adapter from the CLIP of a diffusion transformer (T5, language models, with or without CLIPs) to the core's encoder.

Some of these encoders put a prompt into a template, some pad it and some do not, and Stable Diffusion 3 reads two of
them, one behind the other. None of it is declared, so that it is found by tokenizing and encoding a few prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import comfy.model_management as management
import torch

from ...core.errors import ModelError
from ...core.models.model_survey import ModelSurvey
from ...core.models.text_cache import TOKENIZER_PROBE
from ...core.models.text_entries import POOLED
from ...core.models.text_states import TextStates
from .text import HostEncoder, plain_ids

__all__ = ["TransformerText"]

# tokenizers of CLIPs, whose prompts have a fixed length, and of what is written in a picture
_CLIPS, _GLYPHS = ("l", "g"), ("byt5",)
_CLIP_LENGTH = 77
# the others read as much as they are given
_UNBOUNDED = 1_000_000
# two prompts with the same first word: in a causal encoder its state is the same in both
_PAIR = ("a cat", "a dog")
_SAME = 1e-3


class _Tokens:
    """One of a CLIP's tokenizers, as a text encoder without states.

    Attributes:
        causal: Whether a state knows of the words before it alone.
        cut: How many tokens at the beginning, of a template, the host removes from the states.
    """

    def __init__(self, text: TransformerText, name: str, cut: int, causal: bool) -> None:
        self._text, self._name, self.cut, self.causal = text, name, cut, causal
        self.max_length = _CLIP_LENGTH if name in _CLIPS else _UNBOUNDED

    def _tokens(self, prompt: str) -> list[tuple[Any, ...]]:
        return self._text.tokens(prompt)[self._name][0]

    def _words(self, prompt: str) -> list[int]:
        """The ids of the words of a prompt and of its template."""
        # word id 0 marks start, end and padding
        sections = self._text.tokens(prompt)[self._name]
        return plain_ids([token for section in sections for token in section if token[2] != 0])

    @cached_property
    def _template(self) -> tuple[int, int]:
        """How many tokens of the template stand before and behind the words."""
        one, other = self._words("star"), self._words("7 dogs")
        return _shared(one, other), _shared(one[::-1], other[::-1])

    @cached_property
    def words_from(self) -> int:
        """The position of a prompt's first word."""
        first = next(i for i, token in enumerate(self._tokens("star")) if token[2] != 0)
        return first + self._template[0] - self.cut

    def token_ids(self, prompt: str) -> list[int]:
        return plain_ids(self._tokens(prompt))[self.cut :]

    def phrase_ids(self, phrase: str) -> list[int]:
        before, behind = self._template
        ids = self._words(phrase)
        return ids[before : len(ids) - behind]

    def encode(self, prompts: Sequence[str]) -> TextStates:
        return self._text.encode(prompts)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


class TransformerText(HostEncoder):
    """The CLIP of a diffusion transformer as the core's text encoder, with the host's own tokenizer and encode path.

    Prompts of several lengths have as many states as the host makes of each. The host loads the CLIP when it is used.
    """

    def __init__(self, clip: Any, found: ModelSurvey) -> None:
        """Find out how the CLIP reads prompts.

        Args:
            clip: The host's CLIP.
            found: The survey of the model whose text it encodes.

        Raises:
            ModelError: The CLIP is of another family.
        """
        super().__init__(clip)
        self._family = found.family
        self._pooled = found.width(POOLED)
        self._width = found.context_dim
        self.segments = self._find_segments()
        _, last = self.segments[-1]
        self.max_length = last.max_length

    @property
    def layer(self) -> str:
        """Which hidden states are used, in the core's notation."""
        index = self._clip.layer_idx
        names = "+".join(part._name for _, part in self.segments)
        if index is None and (self._family, names) == ("flux", "t5xxl"):
            return "flux:t5,final_norm"
        return f"{self._family}:{names}" + ("" if index is None else f",layer={index}")

    def fingerprint(self) -> str | None:
        """What the states depend on besides the prompt; ``None`` if hooks may change them on the way."""
        return self._fingerprint(self.layer, [part.token_ids(TOKENIZER_PROBE) for _, part in self.segments])

    def token_ids(self, prompt: str) -> list[int]:
        return self.segments[-1][1].token_ids(prompt)

    def phrase_ids(self, phrase: str) -> list[int]:
        return self.segments[-1][1].phrase_ids(phrase)

    def encode(self, prompts: Sequence[str]) -> TextStates:
        return TextStates.cat([self._encoded(prompt) for prompt in prompts])

    def _encoded(self, prompt: str) -> TextStates:
        management.throw_exception_if_processing_interrupted()
        # of a prompt that is too long for one section, the first, as everywhere in the core
        first = {name: [[token[:2] for token in own[0]]] for name, own in self.tokens(prompt).items() if own and own[0]}
        with torch.inference_mode():
            states, vector = self._clip.encode_from_tokens(first, return_pooled=True)
        # cloned outside of inference mode, it is an ordinary tensor
        if states.ndim != 3 or states.shape[-1] != self._width:
            raise ModelError(
                f"MODEL and CLIP are of different families: the MODEL reads text states of width {self._width} (family "
                f"{self._family}), the CLIP returns {states.shape[-1]}. Connect the CLIP that belongs to the MODEL."
            )
        if self._pooled is not None and (vector is None or vector.shape[-1] != self._pooled):
            raise ModelError(
                f"This MODEL (family {self._family}) also reads a vector of the whole prompt, of width {self._pooled}, "
                "and the CLIP gives none such: load the CLIP with all of its text encoders (DualCLIPLoader or "
                "TripleCLIPLoader)."
            )
        return TextStates(states.clone(), vector.clone() if self._pooled is not None else None)

    def _find_segments(self) -> tuple[tuple[int, _Tokens], ...]:
        """Which tokenizers' states stand where."""
        sections = self.tokens(_PAIR[0])
        one, other = (self._encoded(prompt).hidden[0].float() for prompt in _PAIR)
        stage = self._clip.cond_stage_model
        present = [name for name in sections if name not in _GLYPHS and getattr(stage, name, stage) is not None]
        clips = [name for name in present if name in _CLIPS and getattr(stage, f"clip_{name}", stage) is not None]
        long = [name for name in present if name not in _CLIPS]
        if not long:
            return ((0, _Tokens(self, clips[0] if clips else present[0], 0, True)),)
        main = long[0]
        given = len(sections[main][0])
        found: list[tuple[int, _Tokens]] = []
        first = 0
        if clips and len(one) == _CLIP_LENGTH + given:
            found.append((0, _Tokens(self, clips[0], 0, True)))
            first = _CLIP_LENGTH
        cut = given - (len(one) - first)
        if cut < 0:
            raise ModelError(
                f"The CLIP returns {len(one)} text states for {given} tokens: this version cannot assign them to words."
            )
        part = _Tokens(self, main, cut, True)
        at = first + part.words_from
        difference = float((one[at] - other[at]).norm() / one[at].norm().clamp(min=1e-12))
        part.causal = difference < _SAME
        return (*found, (first, part))
