"""Names of an adapter's tensors: which layer, which part of which kind of adapter, in the namings that trainers write.

Every trainer names the same layer differently. A name is a prefix, a layer in diffusers' or the original (LDM) naming,
dotted or flattened with underscores, and a suffix that says which part of which kind of adapter the tensor is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import ModelError
from ..models.families.registry import FAMILIES
from ..models.recording import RECORDED
from ..models.unet import POOLED_KEY, canonical_from_ldm, ldm_from_canonical

__all__ = [
    "OTHER_MODEL",
    "OTHER_UNET",
    "TEXT_ENCODER",
    "UNET",
    "TensorName",
    "canonical_key",
    "diffusers_path",
    "original_name",
    "parse",
    "place_of",
]

Part = Literal["up", "down", "alpha", "other"]

UNET = "attention and feed-forward layers of the UNet"
OTHER_UNET = "other layers of the UNet"
TEXT_ENCODER = "text encoder"
OTHER_MODEL = "another model"

_PREFIXES = (
    "base_model.model.",
    "diffusion_model.",
    "model.diffusion_model.",
    "lora_unet_",
    "lycoris_unet_",
    "lycoris_",
    "unet.",
    "transformer.",
)
# diffusers kept LoRA layers in attention processors once: attn1.processor.to_q_lora.down.weight
_PROCESSOR = re.compile(r"(?:\.processor)?\.(to_(?:q|k|v|out))_lora\.")
# peft appends the adapter's name, which has no dots
_ADAPTER = r"(?:\.[^.]+)?"
_SUFFIXES: tuple[tuple[str, Part, str], ...] = (
    (rf"\.(?:lora_up|lora_B{_ADAPTER}|lora\.up|lora_linear_layer\.up)\.weight", "up", "LoRA"),
    (rf"\.(?:lora_down|lora_A{_ADAPTER}|lora\.down|lora_linear_layer\.down)\.weight", "down", "LoRA"),
    (r"\.(?:lora\.|lora_linear_layer\.)?alpha", "alpha", ""),
    (r"\.lora_mid\.weight", "other", "LoRA with a core (Tucker)"),
    (rf"\.(?:lora_B{_ADAPTER}|lora_up|lora\.up)\.bias", "other", "LoRA with a bias"),
    (rf"\.(?:dora_scale|lora_magnitude_vector{_ADAPTER}(?:\.weight)?)", "other", "DoRA"),
    (rf"\.hada_(?:w[12]_[ab]|t[12]){_ADAPTER}", "other", "LoHa"),
    (rf"\.lokr_(?:w[12](?:_[ab])?|t2){_ADAPTER}", "other", "LoKr"),
    (rf"\.oft_(?:blocks|diag|r|R){_ADAPTER}", "other", "OFT"),
    (r"\.[ab][12]\.weight", "other", "GLoRA"),
    (r"\.on_input", "other", "IA3"),
    (r"\.(?:diff|diff_b|w_norm|b_norm|set_weight)", "other", "full weights"),
)
_NAME = re.compile("(?P<layer>.+?)(?:" + "|".join(f"({suffix})" for suffix, _, _ in _SUFFIXES) + ")")
_WORDS = (
    "down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block|attentions|transformer_blocks|"
    "attn1|attn2|to_q|to_k|to_v|to_out|ff|net|proj"
)
_FLAT = re.compile(rf"({_WORDS}|\d+)(?:[._]|$)")
_LINEAR = re.compile(r"\.transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out)|ff\.net\.(0\.proj|2))$")
# the layer that reads SDXL's pooled vector, in the original naming and in diffusers'
_POOLED = re.compile(r"label_emb[._]0[._]0|add_embedding[._]linear_1")
_TEXT = re.compile(
    r"(?:(?:lora|lycoris)_te\d?_|text_encoder(?:_\d)?[._]|text_model[._]|te\d?[._]text_model|cond_stage_)"
)
_UNET_PARTS = re.compile(
    r"(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block|conv_in|conv_out|conv_norm_out|"
    r"time_emb|add_embedding|label_emb|out[._]\d)"
)


@dataclass(frozen=True)
class TensorName:
    """A tensor's name in parts.

    Args:
        layer: The layer as the file names it, without the suffix.
        part: ``up``, ``down`` or ``alpha`` of a LoRA; ``other`` for parts that plain LoRA does not have.
        kind: Kind of adapter that has such a part; empty for ``alpha``, which most kinds have.
    """

    layer: str
    part: Part
    kind: str


def parse(name: str) -> TensorName | None:
    """Layer, part and kind of a tensor's name; ``None`` for a name that is no part of a known kind of adapter."""
    match = _NAME.fullmatch(_PROCESSOR.sub(r".\1.lora.", name))
    if match is None:
        return None
    _, part, kind = next(
        suffix for group, suffix in zip(match.groups()[1:], _SUFFIXES, strict=True) if group is not None
    )
    return TensorName(match["layer"], part, kind)


def _without_prefix(layer: str) -> str:
    while prefix := next((p for p in _PREFIXES if layer.startswith(p)), None):
        layer = layer[len(prefix) :]
    return layer


def canonical_key(layer: str, ldm_keys: Mapping[str, str], family: str | None = None) -> str | None:
    """Canonical key of a layer in a file, for any prefix and naming; ``None`` if a patch cannot change it.

    Args:
        layer: As the file names it.
        ldm_keys: Canonical keys of the base model by LDM key, where the model is known.
        family: Id of the family of the base model, where it is known.
    """
    layer = _without_prefix(layer)
    if family == RECORDED:
        return layer
    if _POOLED.fullmatch(layer):
        return POOLED_KEY
    # a name in the naming of the model at hand goes before that of any other family
    if (key := ldm_keys.get(layer) or _of_transformer(layer, family)) is not None:
        return key
    parts, at = [], 0
    while at < len(layer):
        if (match := _FLAT.match(layer, at)) is None:
            return None
        parts.append(match[1])
        at = match.end()
    if len(parts) > 2 and parts[-2:] == ["to_out", "0"]:
        parts.pop()
    key = ".".join(parts)
    if _LINEAR.search(key) is None:
        return None
    if parts[0] in ("input_blocks", "output_blocks", "middle_block"):
        if key in ldm_keys:
            return ldm_keys[key]
        try:
            return canonical_from_ldm(key)
        except ModelError:
            return None
    return key


def _of_transformer(layer: str, family: str | None) -> str | None:
    """Canonical key of a diffusion transformer's layer, whose name in diffusers tells it only within a family."""
    known = next((one for one in FAMILIES if one.id == family), None)
    if known is not None and (key := known.key_of(layer)) is not None:
        return key
    return next((key for one in FAMILIES if (key := one.original_name(layer)) is not None), None)


def diffusers_path(key: str, family: str | None) -> str | None:
    """The path in diffusers of a diffusion transformer's layer; ``None`` for other families."""
    known = next((one for one in FAMILIES if one.id == family), None)
    return None if known is None else known.diffusers_path(key)


def original_name(key: str, family: str | None = None) -> str:
    """The layer's name in the original layout; a UNet is taken to have two layers a block, as SDXL has.

    Args:
        key: Canonical key.
        family: Id of the family of the base model, where it is known.

    Raises:
        ModelError: No layer of a supported model is called that.
    """
    return key if family == RECORDED or _of_transformer(key, None) == key else ldm_from_canonical(key)


def place_of(layer: str, ldm_keys: Mapping[str, str], family: str | None = None) -> str:
    """Where in a model the layer is, as one of this module's constants; arguments as for :func:`canonical_key`."""
    if canonical_key(layer, ldm_keys, family) is not None:
        return UNET
    if _TEXT.match(layer.removeprefix("base_model.model.")):
        return TEXT_ENCODER
    return OTHER_UNET if _UNET_PARTS.match(_without_prefix(layer)) else OTHER_MODEL
