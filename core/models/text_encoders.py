"""Text encoders: from prompts to the text states that a UNet reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ForgetConceptError, ModelError, TokenError
from ..progress import Progress, ProgressEvent, report_progress
from .text_cache import TOKENIZER_PROBE, cache_of, fingerprint
from .text_states import TextStates

__all__ = [
    "ENCODE_ROWS",
    "CLIPText",
    "CachedTokenizer",
    "EncodedPrompts",
    "FluxText",
    "SDXLText",
    "TextEncoder",
    "check_words",
    "clip_body",
    "encode_prompts",
    "encoded_batches",
    "segments_of",
    "words_from",
]

# prompts per call of a text encoder; a batch of another size may round differently
ENCODE_ROWS = 8


class TextEncoder(Protocol):
    """The interface of a text encoder; a host's adapter implements it with the host's own encode path.

    An encoder whose states know of later words says ``causal = False``, and one that does not begin every prompt with
    one start token says how many tokens stand before the words (``words_from``). One whose states are those of several
    tokenizers behind one another has ``segments``: the position of the first state, and a text encoder, for each.
    """

    max_length: int

    def token_ids(self, prompt: str) -> list[int]:
        """The whole encoded sequence: start, words, end and padding; ``max_length`` ids, truncated if needed."""

    def phrase_ids(self, phrase: str) -> list[int]:
        """The ids of the words alone, without special tokens and never truncated."""

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """Text states of the prompts, one row per prompt, without gradient."""


def words_from(encoder: TextEncoder) -> int:
    """The position of a prompt's first word."""
    return int(getattr(encoder, "words_from", 1))


def segments_of(encoder: TextEncoder) -> Sequence[tuple[int, TextEncoder]]:
    """The parts of an encoded prompt: position of the first state, and the tokenizer; only one of most encoders."""
    found: Sequence[tuple[int, TextEncoder]] = getattr(encoder, "segments", None) or ((0, encoder),)
    return found


class CachedTokenizer:
    """A text encoder that tokenizes each text once, for work that asks for the tokens of the same texts many times.

    Args:
        encoder: The text encoder, which everything else is asked of.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self.max_length = encoder.max_length
        self._prompts: dict[str, list[int]] = {}
        self._phrases: dict[str, list[int]] = {}

    def token_ids(self, prompt: str) -> list[int]:
        if prompt not in self._prompts:
            self._prompts[prompt] = list(self._encoder.token_ids(prompt))
        return self._prompts[prompt]

    def phrase_ids(self, phrase: str) -> list[int]:
        if phrase not in self._phrases:
            self._phrases[phrase] = list(self._encoder.phrase_ids(phrase))
        return self._phrases[phrase]

    def encode(self, prompts: Sequence[str]) -> TextStates:
        return self._encoder.encode(prompts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)


def check_words(encoder: TextEncoder, phrases: Iterable[str]) -> None:
    """Check that phrases a person wrote mean words in this host's prompts.

    An encoder may have a method ``reserved(phrase) -> str | None``: a name in the phrase for which the host would put
    in the vectors of a textual inversion. Prompts that no person wrote are not checked: ``encode`` reads them as words.

    Raises:
        TokenError: A phrase contains such a name.
    """
    reserved: Callable[[str], str | None] | None = getattr(encoder, "reserved", None)
    if reserved is None:
        return
    for phrase in phrases:
        if (name := reserved(phrase)) is not None:
            where = "" if name == phrase else f" in '{phrase}'"
            raise TokenError(
                f"'{name}'{where} is the name of a textual inversion, which this host replaces by its vectors: use "
                "other words, or move the file out of the embeddings folder."
            )


def encoded_batches(
    encoder: TextEncoder, prompts: Sequence[str], progress: Progress | None = None
) -> Iterator[TextStates]:
    """Encode fixed prompts in batches of exactly :data:`ENCODE_ROWS`; the empty prompt fills up the last batch.

    Some processors round a batch of another size differently. With one shape, the states of a list of prompts depend on
    that list alone. A batch that the same encoder has encoded before is remembered, with the same bits
    (:mod:`.text_cache`).

    Args:
        encoder: The text encoder.
        prompts: ``n`` prompts; learned vectors among their words must no longer change.
        progress: Called with the number of prompts that are done, of ``n``; it may cancel.

    Yields:
        The states of the prompts in their order, :data:`ENCODE_ROWS` rows at a time; the last ones may be fewer.

    Raises:
        ModelError: The states of a prompt are not finite.
    """
    cache = cache_of(encoder)
    report_progress(progress, ProgressEvent(0, len(prompts), message="encoding the prompts"))
    for i in range(0, len(prompts), ENCODE_ROWS):
        rows = prompts[i : i + ENCODE_ROWS]
        batch = [*rows, *[""] * (ENCODE_ROWS - len(rows))]
        key = ("" if cache is None else cache[1], *batch)
        states = None if cache is None else cache[0].get(key)
        if states is None:
            with torch.no_grad():
                states = encoder.encode(batch)
            _check_finite(states, batch)
            if cache is not None:
                cache[0].put(key, states)
        report_progress(progress, ProgressEvent(i + len(rows), len(prompts), message="encoding the prompts"))
        yield states.index(range(len(rows))) if len(rows) < len(batch) else states


def encode_prompts(encoder: TextEncoder, prompts: Sequence[str], progress: Progress | None = None) -> TextStates:
    """The states of at least one fixed prompt, one row a prompt, in the prompts' order: :func:`encoded_batches` in one.

    Raises:
        ModelError: The states of a prompt are not finite.
    """
    return TextStates.cat(list(encoded_batches(encoder, prompts, progress)))


def _check_finite(states: TextStates, prompts: Sequence[str]) -> None:
    """Raise :class:`ModelError` naming a prompt whose states are not finite."""
    finite = torch.isfinite(states.hidden).flatten(1).all(1)
    if states.pooled is not None:
        finite = finite & torch.isfinite(states.pooled).all(1).to(finite.device)
    if not bool(finite.all()):
        prompt = prompts[finite.tolist().index(False)]
        raise ModelError(
            f"The text encoder gives NaN or infinite values for the prompt '{prompt}': the checkpoint's text encoder "
            "is damaged, or overflows in its dtype. Get the checkpoint again, or run the text encoder in float32."
        )


class EncodedPrompts:
    """The states of a fixed set of prompts, encoded once, at construction (:func:`encode_prompts`).

    What a resumed training reads is then bit-identical to what it read before, whenever a prompt is first needed.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        prompts: Sequence[str],
        device: torch.device | str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Encode the prompts.

        Args:
            encoder: The text encoder.
            prompts: The prompts, in any number; repeated ones are encoded once, and the empty one always is.
            device: Where the states are kept (``None``: where the encoder returns them).
            progress: Called with the number of prompts that are done; may raise :class:`Cancelled`.
        """
        every = list(dict.fromkeys([*prompts, ""]))
        self._row = {prompt: i for i, prompt in enumerate(every)}
        self._states = encode_prompts(encoder, every, progress).to(device)

    def states(self, prompts: Sequence[str]) -> TextStates:
        """The states of some of the prompts, in the given order; a prompt may come twice.

        Raises:
            ForgetConceptError: A prompt was not among those that were encoded.
        """
        for prompt in prompts:
            if prompt not in self._row:
                raise ForgetConceptError(
                    f"The prompt '{prompt}' was not encoded before the first step: name it with the fixed prompts."
                )
        return self._states.index([self._row[prompt] for prompt in prompts])


def _tokens(tokenizer: Any, prompt: str, length: int) -> list[int]:
    encoded = tokenizer(prompt, padding="max_length", max_length=length, truncation=True)
    return [int(i) for i in encoded["input_ids"]]


def _words(tokenizer: Any, phrase: str) -> list[int]:
    return [int(i) for i in tokenizer(phrase, add_special_tokens=False, verbose=False)["input_ids"]]


def clip_body(model: torch.nn.Module) -> Any:
    """The module of transformers' CLIP text model that has ``embeddings``, ``encoder`` and ``final_layer_norm``.

    Older versions wrap it in a ``text_model``; since transformers 5.6 ``CLIPTextModel`` is that module itself.

    Args:
        model: A ``CLIPTextModel`` or ``CLIPTextModelWithProjection``.
    """
    return getattr(model, "text_model", model)


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


class CLIPText:
    """Text encoder of SD1 and SD2: transformers' ``CLIPTextModel`` with its ``CLIPTokenizer``.

    ``clip_skip`` counts as in the webui: 1 is the last layer, 2 the one before it; the final norm is always applied.
    """

    def __init__(self, model: Any, tokenizer: Any, clip_skip: int = 1) -> None:
        layers = int(model.config.num_hidden_layers)
        if not 1 <= clip_skip <= layers:
            raise ModelError(f"clip_skip must be 1 to {layers} for this text encoder, not {clip_skip}.")
        self.model, self.tokenizer, self.clip_skip = model, tokenizer, clip_skip
        self.max_length = min(int(tokenizer.model_max_length), int(model.config.max_position_embeddings))

    @property
    def layer(self) -> str:
        """Which layer the states come from, for a patch's metadata: an edit fits only the states it was fitted on."""
        return f"clip_skip={self.clip_skip},final_norm"

    def modules(self) -> list[torch.nn.Module]:
        """The modules whose weights the states come from."""
        return [self.model]

    def fingerprint(self) -> str | None:
        """What the states depend on besides the prompt (:func:`.text_cache.cache_of`)."""
        return fingerprint(self.modules(), self.layer, self.token_ids(TOKENIZER_PROBE))

    def token_ids(self, prompt: str) -> list[int]:
        return _tokens(self.tokenizer, prompt, self.max_length)

    def phrase_ids(self, phrase: str) -> list[int]:
        return _words(self.tokenizer, phrase)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextStates:
        return self.states(torch.tensor([self.token_ids(p) for p in prompts], device=_device(self.model)))

    def states(self, ids: Tensor) -> TextStates:
        """Text states of token ids ``(n, max_length)``; differentiable if gradients are enabled."""
        if self.clip_skip == 1:
            return TextStates(self.model(ids)[0])
        hidden = self.model(ids, output_hidden_states=True).hidden_states[-self.clip_skip]
        return TextStates(clip_body(self.model).final_layer_norm(hidden))


class SDXLText:
    """SDXL's two text encoders: the concatenated penultimate layers (768 + 1280), and the second one's pooled vector.

    Token positions are the first tokenizer's; the two tokenizers differ only in the padding token.
    """

    layer = "sdxl:penultimate,no_final_norm"

    def __init__(self, model: Any, model_2: Any, tokenizer: Any, tokenizer_2: Any) -> None:
        self.model, self.model_2, self.tokenizer, self.tokenizer_2 = model, model_2, tokenizer, tokenizer_2
        self.max_length = min(int(tokenizer.model_max_length), int(model.config.max_position_embeddings))

    def modules(self) -> list[torch.nn.Module]:
        """The modules whose weights the states come from."""
        return [self.model, self.model_2]

    def fingerprint(self) -> str | None:
        """What the states depend on besides the prompt (:func:`.text_cache.cache_of`)."""
        return fingerprint(
            self.modules(),
            self.layer,
            self.token_ids(TOKENIZER_PROBE),
            _tokens(self.tokenizer_2, TOKENIZER_PROBE, self.max_length),
        )

    def token_ids(self, prompt: str) -> list[int]:
        return _tokens(self.tokenizer, prompt, self.max_length)

    def phrase_ids(self, phrase: str) -> list[int]:
        return _words(self.tokenizer, phrase)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextStates:
        ids = torch.tensor([_tokens(self.tokenizer, p, self.max_length) for p in prompts], device=_device(self.model))
        ids_2 = torch.tensor(
            [_tokens(self.tokenizer_2, p, self.max_length) for p in prompts], device=_device(self.model_2)
        )
        first = self.model(ids, output_hidden_states=True).hidden_states[-2]
        second = self.model_2(ids_2, output_hidden_states=True)
        hidden = torch.cat([first, second.hidden_states[-2].to(first.device, first.dtype)], dim=-1)
        return TextStates(hidden, second.text_embeds.to(first.device, first.dtype))


class FluxText:
    """Flux's text encoders: T5's last states, and CLIP's pooled vector.

    T5 reads the padding as words, as Flux was trained. Token positions are T5's.
    """

    layer = "flux:t5,final_norm"
    # T5 has no start token, and every state knows of the whole prompt
    words_from, causal = 0, False

    def __init__(self, model: Any, model_2: Any, tokenizer: Any, tokenizer_2: Any, max_length: int = 512) -> None:
        """Wrap the parts under their names in a pipeline: ``model`` is the CLIP, ``model_2`` the T5."""
        self.model, self.model_2, self.tokenizer, self.tokenizer_2 = model, model_2, tokenizer, tokenizer_2
        self.max_length = max_length

    def modules(self) -> list[torch.nn.Module]:
        """The modules whose weights the states come from."""
        return [self.model, self.model_2]

    def fingerprint(self) -> str | None:
        """What the states depend on besides the prompt (:func:`.text_cache.cache_of`)."""
        return fingerprint(self.modules(), self.layer, self.token_ids(TOKENIZER_PROBE), self._clip_ids(TOKENIZER_PROBE))

    def _clip_ids(self, prompt: str) -> list[int]:
        return _tokens(self.tokenizer, prompt, int(self.model.config.max_position_embeddings))

    def token_ids(self, prompt: str) -> list[int]:
        return _tokens(self.tokenizer_2, prompt, self.max_length)

    def phrase_ids(self, phrase: str) -> list[int]:
        return _words(self.tokenizer_2, phrase)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextStates:
        ids = torch.tensor([self.token_ids(prompt) for prompt in prompts], device=_device(self.model_2))
        short = torch.tensor([self._clip_ids(prompt) for prompt in prompts], device=_device(self.model))
        hidden = self.model_2(ids)[0]
        return TextStates(hidden, self.model(short).pooler_output.to(hidden))
