"""Patches as kohya LoRA files, which ComfyUI, the webui, Forge and diffusers load without this plugin.

Written: ``lora_unet_<layer>.lora_up.weight``, ``.lora_down.weight`` and ``.alpha`` with ``alpha = rank``, so that the
factor ``alpha / rank`` of hosts is 1. Layers have their diffusers names; for SDXL their LDM names, as kohya's trainer
writes them. Read: both namings, flattened or dotted, with ``lora_up``/``lora_down`` or ``lora_A``/``lora_B``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ModelError, PatchError, listed
from ..files.safetensors_io import read_safetensors, write_safetensors
from ..models.unet import UNetSurvey, canonical_from_ldm, ldm_from_canonical
from ..patch.low_rank import LowRank
from ..patch.metadata import kohya_metadata
from ..patch.outlets import saves_as
from ..patch.patch import Patch

__all__ = ["from_state", "load", "save", "to_state"]

_PREFIXES = ("base_model.model.", "diffusion_model.", "model.diffusion_model.", "lora_unet_", "unet.")
_UP = (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight")
_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight")
_WORDS = (
    "down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block|attentions|transformer_blocks|"
    "attn1|attn2|to_q|to_k|to_v|to_out|ff|net|proj"
)
_FLAT = re.compile(rf"({_WORDS}|\d+)(?:[._]|$)")
_LINEAR = re.compile(r"\.transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out)|ff\.net\.(0\.proj|2))$")


def to_state(
    patch: Patch, survey: UNetSurvey | None = None, dtype: torch.dtype = torch.float32, dotted: bool = False
) -> dict[str, Tensor]:
    """The patch as a LoRA state dict.

    Args:
        patch: The patch.
        survey: Survey of the base model, for LDM names (SDXL); without it two layers per block are assumed, as in SDXL.
        dtype: Dtype of the factors.
        dotted: Use ComfyUI's native keys, ``diffusion_model.<ldm path>``, instead of kohya's flattened ones.

    Raises:
        PatchError: A value overflows ``dtype``.
    """
    ldm = dotted or patch.about.family == "sdxl" or bool(survey and survey.family == "sdxl")
    state: dict[str, Tensor] = {}
    for key, factor in patch.factors.items():
        layer = key
        if ldm:
            layer = survey.layer(key).ldm_key if survey is not None else ldm_from_canonical(key)
        if layer.endswith(".to_out"):
            layer += ".0"
        name = f"diffusion_model.{layer}" if dotted else "lora_unet_" + layer.replace(".", "_")
        up, down = factor.up.detach().cpu().to(dtype), factor.down.detach().cpu().to(dtype)
        if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise PatchError(
                f"The patch overflows {str(dtype).removeprefix('torch.')} at {key}: save it in a wider dtype."
            )
        state[f"{name}.lora_up.weight"] = up.contiguous()
        state[f"{name}.lora_down.weight"] = down.contiguous()
        state[f"{name}.alpha"] = torch.tensor(float(factor.rank), dtype=torch.float32)
    return state


@saves_as("kohya")
def save(
    patch: Patch,
    path: str | os.PathLike[str],
    survey: UNetSurvey | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a patch atomically as a kohya LoRA, with the metadata by which hosts recognize the model family.

    Raises:
        PatchError: A factor is not finite or overflows ``dtype``, or the file cannot be written.
    """
    patch.check_finite()
    family = patch.about.family or (survey.family if survey else "other")
    metadata = {**patch.metadata, **kohya_metadata(patch.rank, family, Path(path).stem)}
    write_safetensors(to_state(patch, survey, dtype), path, metadata)


def load(path: str | os.PathLike[str], survey: UNetSurvey | None = None) -> Patch:
    """Read a LoRA file as a patch.

    Args:
        path: The file.
        survey: Survey of the base model; needed for LDM names of a UNet without two layers per block.

    Raises:
        PatchError: The file cannot be read, or changes other layers than the linear ones of the UNet's transformer
            blocks.
    """
    tensors, metadata = read_safetensors(path)
    return from_state(tensors, metadata, survey, str(path))


def from_state(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    survey: UNetSurvey | None = None,
    source: str = "the patch",
) -> Patch:
    """Read a LoRA state dict as a patch; see :func:`load`.

    Args:
        tensors: The state dict.
        metadata: Metadata of its file.
        survey: As for :func:`load`.
        source: What error messages call it.
    """
    ldm_keys = {} if survey is None else {layer.ldm_key: key for key, layer in survey.layers.items()}
    ups: dict[str, Tensor] = {}
    downs: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    strange = []
    for name, tensor in tensors.items():
        for suffixes, parts in ((_UP, ups), (_DOWN, downs), ((".alpha",), alphas)):
            suffix = next((s for s in suffixes if name.endswith(s)), None)
            if suffix is None:
                continue
            key = _canonical(name[: -len(suffix)], ldm_keys)
            if key is None:
                strange.append(name)
            elif key in parts:
                raise PatchError(f"'{source}' has the layer {key} twice.")
            elif parts is alphas:
                alphas[key] = float(tensor)
            else:
                parts[key] = tensor  # type: ignore[assignment]
            break
        else:
            strange.append(name)
    if not ups and not downs:
        raise PatchError(f"'{source}' holds no LoRA of an attention layer ({listed(strange, 2) or 'it is empty'}).")
    if strange:
        raise PatchError(
            f"'{source}' is a LoRA that changes more than the UNet's attention and feed-forward layers ({len(strange)} "
            f"entries such as {listed(strange, 2)}): load it with the host's own LoRA loader instead."
        )
    if lone := sorted(set(ups) ^ set(downs)) or sorted(set(alphas) - set(ups)):
        raise PatchError(f"'{source}' is incomplete: the layer {lone[0]} has only a part of its LoRA.")
    factors = {}
    for key, up in ups.items():
        down = downs[key]
        if up.ndim == 4 and down.ndim == 4:  # the LoRA of a 1×1 convolution
            up, down = up.flatten(1), down.flatten(1)
        rank = down.shape[0]
        scale = alphas.get(key, float(rank)) / max(rank, 1)
        factors[key] = LowRank(up if scale == 1 else up.float() * scale, down if scale == 1 else down.float())
    return Patch(factors, dict(metadata or {}))


def _canonical(layer: str, ldm_keys: Mapping[str, str]) -> str | None:
    """Canonical key of a layer in a file, for any prefix and naming; ``None`` if a patch cannot change it."""
    while prefix := next((p for p in _PREFIXES if layer.startswith(p)), None):
        layer = layer[len(prefix) :]
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
