"""Adapter from a ComfyUI CLIP to the core's text encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.clip_model
import comfy.model_management as management
import torch
from torch import Tensor

from ...core.errors import ModelError
from ...core.models.text_cache import TOKENIZER_PROBE, fingerprint
from ...core.models.text_encoders import CLIPText, TextEncoder, clip_body
from ...core.models.text_states import TextStates

__all__ = ["HostEncoder", "HostText", "Tokens", "differentiable_copy", "plain_ids"]

# by tokenizer and section
Tokens = dict[str, list[list[tuple[Any, ...]]]]

# relative difference up to which two text encoders count as the same, one perhaps in half precision
_SAME_STATES = 0.02


def escaped(text: str) -> str:
    """``text`` with parentheses escaped, which are emphasis syntax in a prompt but plain text in a concept."""
    return re.sub(r"(?<!\\)([()])", r"\\\1", text)


def plain_ids(tokens: Sequence[tuple[Any, ...]]) -> list[int]:
    """The ids of tokens. Raises :class:`ModelError` where a textual inversion put in its vectors."""
    if any(isinstance(token[0], Tensor) for token in tokens):
        raise ModelError("A concept cannot contain a textual inversion ('embedding:…'): write it in words.")
    return [int(token[0]) for token in tokens]


class HostEncoder:
    """What every CLIP of the host has in common, as the core's text encoder."""

    def __init__(self, clip: Any) -> None:
        self._clip = clip.clone()

    def modules(self) -> list[torch.nn.Module]:
        """The modules whose weights the states come from."""
        return [self._clip.patcher.model]

    def _fingerprint(self, *about: object) -> str | None:
        """What the states depend on besides the prompt; ``None`` if hooks may change them on the way."""
        patcher = self._clip.patcher
        if patcher.forced_hooks is not None:
            return None
        # patches may be added to a weight only when it is used
        return fingerprint(self.modules(), str(patcher.patches_uuid), *about)

    def tokens(self, prompt: str, word_ids: bool = True) -> Tokens:
        """The host's tokens of a prompt by tokenizer and section: ``(id, weight)``, and the word's id if wanted."""
        tokens = self._clip.tokenize(escaped(prompt), return_word_ids=word_ids)
        if not isinstance(tokens, dict) or not tokens:
            raise ModelError("The input CLIP is not a text encoder: connect the one that belongs to the MODEL.")
        return tokens

    def reserved(self, phrase: str) -> str | None:
        """The first textual inversion that a phrase calls by the host's syntax, or ``None``."""
        # the host drops the name of a missing file without an error
        return next((word for word in phrase.split() if word.startswith("embedding:")), None)


class HostText(HostEncoder):
    """A CLIP as the core's text encoder, with the host's own tokenizer and encode path (layer, norm, patches, hooks).

    Only the first section of 77 tokens is used. The CLIP must already be loaded.
    """

    max_length = 77
    _AT_ONCE = 32

    def __init__(self, clip: Any, family: str, pooled: bool) -> None:
        """``pooled`` tells whether the model needs a pooled vector too."""
        super().__init__(clip)
        self._pooled = pooled
        # loading again for every prompt could unload the UNet that is in use
        self._clip.load_model = lambda *args, **kwargs: self._clip.patcher
        self._family = family

    @property
    def layer(self) -> str:
        """Which hidden states are used, in the core's notation."""
        index = self._clip.layer_idx
        stage = self._clip.cond_stage_model
        if hasattr(stage, "clip_l") and hasattr(stage, "clip_g"):
            return "sdxl:penultimate,no_final_norm" if index in (None, -2) else f"sdxl:layer={index}"
        if self._family == "sd2":
            return "clip_skip=1,final_norm" if index in (None, -2) else f"layer={index}"
        return f"clip_skip={1 if index is None else -index},final_norm"

    def fingerprint(self) -> str | None:
        """What the states depend on besides the prompt; ``None`` if hooks may change them on the way."""
        return self._fingerprint(self.layer, self._pooled, self.token_ids(TOKENIZER_PROBE))

    def _first(self, tokens: Mapping[str, Any]) -> list[list[tuple[Any, ...]]]:
        return tokens["l"] if "l" in tokens else next(iter(tokens.values()))

    def token_ids(self, prompt: str) -> list[int]:
        return plain_ids(self._first(self.tokens(prompt, word_ids=False))[0])

    def phrase_ids(self, phrase: str) -> list[int]:
        sections = self._first(self.tokens(phrase))
        # word id 0 marks start, end and padding
        return plain_ids([token for section in sections for token in section if token[2] != 0])

    def encode(self, prompts: Sequence[str]) -> TextStates:
        # the host encodes all sections of a batch as one prompt, and returns only the first pooled vector
        size = 1 if self._pooled else self._AT_ONCE
        found = [self._encoded(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        return TextStates.cat(found)

    def _encoded(self, prompts: Sequence[str]) -> TextStates:
        management.throw_exception_if_processing_interrupted()
        sections: dict[str, list[list[tuple[Any, ...]]]] = {}
        for prompt in prompts:
            for name, own in self.tokens(prompt, word_ids=False).items():
                sections.setdefault(name, []).append(own[0])
        with torch.inference_mode():
            states, vector = self._clip.encode_from_tokens(sections, return_pooled=True)
        # cloned outside of inference mode, it is an ordinary tensor
        hidden = states.clone().unflatten(1, (len(prompts), -1)).flatten(0, 1)
        return TextStates(hidden, vector.clone() if self._pooled and vector is not None else None)


def differentiable_copy(clip: Any, own: TextEncoder, device: torch.device) -> CLIPText | None:
    """Copy a CLIP into a text encoder that gradients can flow through, for textual inversion and attacks.

    The weights are copied as loaded, including patches.

    Returns:
        ``None`` if the host's text encoder is not a single CLIP, or the copy does not reproduce the states of ``own``.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    name = getattr(clip.cond_stage_model, "clip", "")
    encoder: Any = getattr(clip.cond_stage_model, name, None)
    tokenizer: Any = getattr(getattr(clip.tokenizer, name, None), "tokenizer", None)
    if type(getattr(encoder, "transformer", None)) is not comfy.clip_model.CLIPTextModel or tokenizer is None:
        return None
    body = encoder.transformer.text_model
    layer = body.encoder.layers[0]
    table = body.embeddings.token_embedding.weight
    # some tables have rows that no token uses
    rows = min(len(table), len(tokenizer))
    quick = layer.mlp.activation is comfy.clip_model.ACTIVATIONS["quick_gelu"]
    config = CLIPTextConfig(
        vocab_size=rows,
        hidden_size=table.shape[1],
        intermediate_size=layer.mlp.fc1.weight.shape[0],
        num_hidden_layers=len(body.encoder.layers),
        num_attention_heads=layer.self_attn.heads,
        max_position_embeddings=body.embeddings.position_embedding.weight.shape[0],
        hidden_act="quick_gelu" if quick else "gelu",
        bos_token_id=encoder.special_tokens["start"],
        eos_token_id=encoder.special_tokens["end"],
    )
    with torch.inference_mode(False), torch.no_grad():
        with torch.random.fork_rng(devices=[]):  # the random initial weights are overwritten
            copied = CLIPTextModel(config).float().eval().requires_grad_(False)
        state = {key: value.detach().float().cpu() for key, value in body.state_dict().items()}
        state["embeddings.token_embedding.weight"] = state["embeddings.token_embedding.weight"][:rows]
        found = clip_body(copied).load_state_dict(state, strict=False)
        if found.missing_keys or found.unexpected_keys:
            return None
        index = clip.layer_idx if clip.layer_idx is not None else encoder.layer_idx
        copy = CLIPText(copied.to(device), tokenizer, 1 if index is None else -index)
        prompts = ["", "a photo of a red star beside a house"]
        states, wanted = copy.encode(prompts).hidden.float(), own.encode(prompts).hidden.float().to(device)
        if states.shape != wanted.shape or float((states - wanted).norm() / wanted.norm()) > _SAME_STATES:
            return None
    return copy
