"""Patches as kohya LoRA files, which ComfyUI, the webui, Forge and diffusers load without this plugin.

Written: ``lora_unet_<layer>.lora_up.weight``, ``.lora_down.weight`` and ``.alpha``. All layers have one alpha, whatever
their ranks, with ``up`` scaled by ``rank / alpha``: diffusers takes the commonest alpha of a file for all its layers,
while other hosts read each layer's own. Where ranks differ, each is padded with zeros to a power of two, so that this
scale is a power of two and costs no rounding; reading removes the padding. Layers have their diffusers names; for SDXL
their LDM names, as kohya's trainer writes them. Read: every naming of :mod:`.naming`, with alphas from tensors or from
diffusers' metadata.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import PatchError, UnsupportedAdapterError, listed
from ..files.safetensors_io import check_finite, read_safetensors, widened, write_safetensors
from ..models.model_survey import ModelSurvey
from ..models.recording import RECORDED
from ..models.unet import POOLED_KEY
from ..patch.low_rank import LowRank
from ..patch.metadata import PatchMetadata, kohya_metadata
from ..patch.outlets import saves_as
from ..patch.patch import Patch
from . import adapter_config, naming
from .adapter_config import AdapterConfig

__all__ = ["common_alpha", "from_state", "load", "save", "to_state", "with_alphas"]


def stored_ranks(patch: Patch) -> dict[str, int]:
    """The rank of every layer in a patch's file: its own where all are equal, else the next power of two."""
    ranks = {key: factor.rank for key, factor in patch.factors.items()}
    if len(set(ranks.values())) == 1:
        return ranks
    return {key: 1 << (rank - 1).bit_length() for key, rank in ranks.items()}


def common_alpha(ranks: Mapping[str, int]) -> float:
    """The alpha of all layers in a file with these ranks: the commonest rank, the highest of several."""
    counts = Counter(ranks.values())
    return float(max(counts, key=lambda rank: (counts[rank], rank)))


def _without_padding(factor: LowRank) -> LowRank:
    """The factor without trailing directions that are zero on both sides; at least one direction is kept."""
    used = ((factor.up != 0).any(0) | (factor.down != 0).any(1)).nonzero()
    rank = int(used.max()) + 1 if len(used) else 1
    return factor if rank >= factor.rank else LowRank(factor.up[:, :rank], factor.down[:rank])


def to_state(
    patch: Patch, survey: ModelSurvey | None = None, dtype: torch.dtype = torch.float32, dotted: bool = False
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
    # only the LDM name of the layer that reads the pooled vector is known to every host
    # dots tell where the layer of an unknown model stands
    dotted = dotted or patch.about.family == RECORDED
    ldm = dotted or patch.about.family == "sdxl" or POOLED_KEY in patch.factors
    ldm = ldm or bool(survey and survey.family == "sdxl")
    state: dict[str, Tensor] = {}
    ranks = stored_ranks(patch)
    alpha = common_alpha(ranks)
    for key, factor in patch.factors.items():
        layer = key
        if ldm:
            layer = survey.layer(key).ldm_key if survey is not None else naming.original_name(key, patch.about.family)
        if layer.endswith(".to_out"):
            layer += ".0"
        name = f"diffusion_model.{layer}" if dotted else "lora_unet_" + layer.replace(".", "_")
        up, down = factor.up.detach().cpu(), factor.down.detach().cpu().to(dtype)
        padding = ranks[key] - factor.rank
        up, down = functional.pad(up, (0, padding)), functional.pad(down, (0, 0, 0, padding))
        # a power of two: exact, unless a value leaves the range of the dtype
        up = (up * (ranks[key] / alpha)).to(dtype)
        if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise PatchError(
                f"The patch overflows {str(dtype).removeprefix('torch.')} at {key}: save it in a wider dtype."
            )
        state[f"{name}.lora_up.weight"] = up.contiguous()
        state[f"{name}.lora_down.weight"] = down.contiguous()
        state[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return state


@saves_as("kohya")
def save(
    patch: Patch,
    path: str | os.PathLike[str],
    survey: ModelSurvey | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a patch atomically as a kohya LoRA, with the metadata by which hosts recognize the model family.

    Raises:
        PatchError: A factor is not finite or overflows ``dtype``, or the file cannot be written.
    """
    patch.check_finite()
    family = patch.about.family or (survey.family if survey else "other")
    ranks = stored_ranks(patch)
    metadata = {**patch.metadata, **kohya_metadata(max(ranks.values()), common_alpha(ranks), family, Path(path).stem)}
    write_safetensors(to_state(patch, survey, dtype), path, metadata)


def load(path: str | os.PathLike[str], survey: ModelSurvey | None = None) -> Patch:
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
    survey: ModelSurvey | None = None,
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
    about = PatchMetadata.from_strings(metadata or {})
    if about.format is not None:
        raise PatchError(
            f"'{source}' is a file of the format '{about.format[:80]}', not a LoRA: give the model that it is for, or "
            "read it with the version that wrote it."
        )
    family = about.family if survey is None else survey.family
    _check_expressible(tensors, ldm_keys, family, source)
    config = AdapterConfig.from_metadata(metadata or {}, source)
    if config is not None and config.dora:
        raise _unsupported(source, f"is a DoRA, as its metadata ({adapter_config.KEY}) says")
    ups: dict[str, Tensor] = {}
    downs: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, tensor in tensors.items():
        found = naming.parse(name)
        assert found is not None
        key = naming.canonical_key(found.layer, ldm_keys, family)
        assert key is not None
        if key in (alphas if found.part == "alpha" else ups if found.part == "up" else downs):
            raise PatchError(
                f"'{source}' has the layer {key} twice ({found.part}): it holds several LoRAs, or one in two namings."
            )
        if found.part == "alpha":
            alphas[key] = _alpha(name, tensor, source)
        else:
            (ups if found.part == "up" else downs)[key] = widened(name, tensor, source)
    if lone := sorted(set(ups) ^ set(downs)) or sorted(set(alphas) - set(ups)):
        raise PatchError(f"'{source}' is incomplete: the layer {lone[0]} has only a part of its LoRA.")
    factors = {}
    for key, up in ups.items():
        down = downs[key]
        if up.ndim == 4 and down.ndim == 4:  # the LoRA of a 1×1 convolution
            up, down = up.flatten(1), down.flatten(1)
        if not up.numel() or not down.numel() or not down.ndim:
            raise PatchError(
                f"'{source}' is malformed: the factors of {key} have the shapes {list(up.shape)} and "
                f"{list(down.shape)}. Make the LoRA again."
            )
        rank = down.shape[0]
        if key in alphas:
            scale = alphas[key] / rank
        else:
            scale = 1.0 if config is None else config.scale(_module_name(key, family), rank)
        factor = LowRank(up if scale == 1 else (up.double() * scale).to(up.dtype), down)
        factors[key] = _without_padding(factor)
    if not any(factor.up.any() and factor.down.any() for factor in factors.values()):
        raise PatchError(
            f"'{source}' changes nothing: in every layer a factor or the alpha is zero. It was saved before it was "
            "trained, or at strength 0; make it again."
        )
    check_finite(
        {f"{key}.{part}": getattr(one, part) for key, one in factors.items() for part in ("up", "down")}, source
    )
    # what the configuration said is in the factors now; diffusers refuses a file that has it beside alphas
    return Patch(factors, {name: text for name, text in (metadata or {}).items() if name != adapter_config.KEY})


def with_alphas(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> dict[str, Tensor]:
    """A LoRA's state dict with the alphas that only its metadata has as tensors, for loaders that read no metadata.

    Args:
        tensors: The state dict, in any naming; layers that have an alpha keep it.
        metadata: Metadata of its file.
        source: What error messages call it.

    Raises:
        PatchError: The adapter's configuration in the metadata cannot be read.
    """
    state = dict(tensors)
    config = AdapterConfig.from_metadata(metadata, source)
    if config is None:
        return state
    family = PatchMetadata.from_strings(metadata).family
    names = {name: found for name in tensors if (found := naming.parse(name)) is not None}
    stated = {found.layer for found in names.values() if found.part == "alpha"}
    for name, found in names.items():
        key = naming.canonical_key(found.layer, {}, family)
        if found.part == "down" and found.layer not in stated and key is not None:
            rank = tensors[name].shape[0]
            state[f"{found.layer}.alpha"] = torch.tensor(config.scale(_module_name(key, family), rank) * rank)
    return state


def _alpha(name: str, tensor: Tensor, source: str) -> float:
    """The value of an alpha; trainers write integers, too."""
    if tensor.numel() == 1 and not tensor.is_complex() and tensor.dtype != torch.bool:
        value = float(tensor)
        if math.isfinite(value):
            return value
    shown = f"is {float(tensor):g}" if tensor.numel() == 1 and not tensor.is_complex() else "is malformed"
    raise PatchError(
        f"The alpha {name} in '{source}' {shown} (shape {list(tensor.shape)}, "
        f"{str(tensor.dtype).removeprefix('torch.')}): an alpha is one finite number. Make the LoRA again."
    )


def _module_name(key: str, family: str | None) -> str:
    """The layer's name in diffusers' modules."""
    if (path := naming.diffusers_path(key, family)) is not None:
        return path
    return key + ".0" if key.endswith(".to_out") else key


def _unsupported(source: str, what: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"'{source}' {what}, and a patch is a plain LoRA of the UNet's attention and feed-forward layers: load it with "
        "the host's own LoRA loader instead."
    )


def _check_expressible(
    tensors: Mapping[str, Tensor], ldm_keys: Mapping[str, str], family: str | None, source: str
) -> None:
    """Refuse an adapter of which a patch could express only a part, or nothing."""
    kinds: Counter[str] = Counter()
    elsewhere: dict[str, list[str]] = {}
    strange = []
    for name in tensors:
        if (found := naming.parse(name)) is None:
            strange.append(name)
            continue
        if found.part == "other":
            kinds[found.kind] += 1
        if (place := naming.place_of(found.layer, ldm_keys, family)) != naming.UNET:
            elsewhere.setdefault(place, []).append(name)
    if len(strange) == len(tensors):
        raise PatchError(f"'{source}' holds no LoRA of an attention layer ({listed(strange, 2) or 'it is empty'}).")
    if kinds:
        parts = ", ".join(f"{kind} in {_tensors(count)}" for kind, count in kinds.most_common())
        raise _unsupported(source, f"has parts that plain LoRA has not ({parts})")
    if elsewhere:
        count = sum(map(len, elsewhere.values()))
        names = [name for several in elsewhere.values() for name in several]
        parts = f"{', '.join(elsewhere)}: {_tensors(count)} such as {listed(names, 2)}"
        if count == len(tensors) - len(strange):
            raise _unsupported(source, f"holds no LoRA of an attention layer ({parts})")
        raise _unsupported(
            source,
            f"changes more than the UNet's attention and feed-forward layers ({parts})",
        )
    if strange:
        raise _unsupported(
            source, f"has tensors of unknown meaning ({_tensors(len(strange))} such as {listed(strange, 2)})"
        )


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' if count > 1 else ''}"
