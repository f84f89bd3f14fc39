"""Cross-attention sites and transformer linear layers of a raw UNet, under one canonical name in every library.

A canonical name is the dotted path in diffusers' ``UNet2DConditionModel``. For a UNet in LDM naming (``input_blocks`` /
``middle_block`` / ``output_blocks``: the original code, ComfyUI, the webui) it is derived from the model's own blocks,
whatever their number of layers. Only the shapes of weights are read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from ..errors import ModelError, UnknownFamilyError
from .architectures import architecture_of
from .model_survey import (
    PROJECTIONS,
    TEXT_PROJECTIONS,
    CrossAttentionSite,
    Layer,
    ModelSurvey,
    attention_linear,
    plain_linear,
)
from .text_entries import POOLED, TOKENS, TextEntry

__all__ = [
    "POOLED_KEY",
    "UNetSurvey",
    "canonical_from_ldm",
    "ldm_from_canonical",
    "survey_unet",
]

# the layer of SDXL that reads the pooled vector, and its LDM name
POOLED_KEY, POOLED_LDM = "add_embedding.linear_1", "label_emb.0.0"
# beside the pooled vector it reads a sinusoidal embedding of six sizes of the picture, or of five in SDXL's refiner
_SIZE_WIDTH, _SIZES, _REFINER_SIZES = 256, 6, 5
# widths of the text states of SDXL's refiner, and of SD2, whose vector input is a picture's (unCLIP)
_REFINER_WIDTH, _SD2_WIDTH = 1280, 1024

_TRANSFORMER = re.compile(r"^(?P<place>.+)\.(?P<inner>transformer_blocks\.\d+\.attn[12])$")
_LAYER = re.compile(
    r"^(?P<place>.+)\.(?P<inner>transformer_blocks\.\d+\."
    r"(?:attn[12]\.(?:to_[qkv]|to_out)|ff\.net\.0\.proj|ff\.net\.2))(?:(?<=to_out)\.0)?$"
)


@dataclass(frozen=True)
class UNetSurvey(ModelSurvey):
    """All cross-attention sites of one UNet, in forward order (down, middle, up)."""

    @cached_property
    def layers(self) -> Mapping[str, Layer]:
        """Every linear layer of the transformer blocks by canonical key, including those of the sites.

        These are the layers that LoRA trainers target when they train the whole UNet. Raises :class:`ModelError` if one
        of them is not a plain linear layer.
        """
        places = _ldm_places(self.unet) if self.layout == "ldm" else _diffusers_places(self.unet)
        found: list[Layer] = []
        for path, module in self.unet.named_modules():
            match = _LAYER.match(path)
            if match is None or match["place"] not in places or isinstance(module, (nn.Sequential, nn.ModuleList)):
                continue
            canonical, ldm = places[match["place"]]
            found.append(
                Layer(f"{canonical}.{match['inner']}", f"{ldm}.{match['inner']}", path, plain_linear(module, path))
            )
        # the sort is stable: within a block, layers keep the module's order
        found.sort(key=lambda layer: _order(layer.key.split(".transformer_blocks.")[0]))
        return {layer.key: layer for layer in found}

    @cached_property
    def pooled(self) -> Layer | None:
        """The layer that reads the pooled vector; ``None`` where the UNet reads none."""
        return _pooled_layer(self.unet, self.layout, self.context_dim)

    @cached_property
    def entries(self) -> tuple[TextEntry, ...]:
        """The layers that read text first: K and V of every site, and the layer that reads the pooled vector."""
        found = [
            TextEntry(site.key(which), TOKENS, site.projection(which), self.context_dim)
            for site in self.sites
            for which in TEXT_PROJECTIONS
        ]
        if self.pooled is not None:
            width = self.pooled.module.in_features - _sizes_width(self.unet, self.context_dim)
            found.append(TextEntry(POOLED_KEY, POOLED, self.pooled.module, width))
        return tuple(found)

    def find(self, key: str) -> Layer | None:
        """Return the layer with a canonical key, or ``None`` if this UNet lacks it."""
        if key == POOLED_KEY:
            return self.pooled
        if (found := self.split(key)) is not None:
            site, which = found
            return Layer(key, f"{site.ldm_name}.{which}", site.weight_path(which), site.projection(which))
        return self.layers.get(key) if _LAYER.match(key) else None

    def fingerprint(self) -> str:
        """Hash of the architecture: names and shapes of the sites, not weights. Equal in both layouts."""
        lines = [
            f"{site.key(which)}:{tuple(site.projection(which).weight.shape)}:{site.heads}"
            for site in self.sites
            for which in PROJECTIONS
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def survey_unet(unet: nn.Module) -> UNetSurvey:
    """Find every cross-attention site of a raw UNet, in diffusers' or LDM naming.

    Args:
        unet: The UNet module itself, not a host's wrapper or a pipeline. The meta device works too.

    Returns:
        The sites in forward order, with the layout and the model family.

    Raises:
        ModelError: If there is no cross-attention, or a projection is not a plain linear layer (quantised, or wrapped
            by another library's adapter).
    """
    children = dict(unet.named_children())
    if "input_blocks" in children and "output_blocks" in children:
        layout, places = "ldm", _ldm_places(unet)
    elif "down_blocks" in children and "up_blocks" in children:
        layout, places = "diffusers", _diffusers_places(unet)
    elif (name := architecture_of(unet)) is not None:
        raise UnknownFamilyError(
            f"This is a {name} model, of which it is not known here where it reads the text: choose a model of another "
            "family."
        )
    else:
        raise UnknownFamilyError(
            f"This model ({type(unet).__name__}) has no cross-attention UNet of a supported structure: neither "
            "diffusers' down_blocks and up_blocks nor the original input_blocks and output_blocks."
        )
    found: list[tuple[tuple[int, ...], CrossAttentionSite]] = []
    for path, module in unet.named_modules():
        if (match := _TRANSFORMER.match(path)) is None or not _is_cross_attention(unet, path, module):
            continue
        if (names := places.get(match["place"])) is None:
            raise ModelError(f"Unexpected cross-attention at '{path}': this UNet's structure is not supported.")
        canonical, ldm = names
        inner = match["inner"]
        site = CrossAttentionSite(
            name=f"{canonical}.{inner}",
            ldm_name=f"{ldm}.{inner}",
            path=path,
            module=module,
            heads=int(module.heads),
            context_dim=attention_linear(module, "to_k", path).in_features,
        )
        for which in PROJECTIONS:
            site.projection(which)
        found.append((_order(site.name), site))
    if not found:
        raise ModelError(
            f"This model ({type(unet).__name__}) has no cross-attention, so there is nothing that these methods could "
            "edit."
        )
    found.sort(key=lambda item: item[0])
    sites = tuple(site for _, site in found)
    widths = sorted({site.context_dim for site in sites})
    if len(widths) > 1:
        raise ModelError(
            f"This model's cross-attention reads text states of several widths ({widths}), which is not supported."
        )
    return UNetSurvey(unet, sites, layout, _family(unet, len(sites), widths[0]), widths[0])


def _sizes_width(unet: nn.Module, context_dim: int) -> int:
    """How many of the inputs beside the pooled vector are the picture's sizes."""
    width = getattr(getattr(unet, "config", None), "addition_time_embed_dim", None) or _SIZE_WIDTH
    return int(width) * (_REFINER_SIZES if context_dim == _REFINER_WIDTH else _SIZES)


def _pooled_layer(unet: nn.Module, layout: str, context_dim: int) -> Layer | None:
    module: Any = None
    if layout == "diffusers":
        path, module = POOLED_KEY, getattr(getattr(unet, "add_embedding", None), "linear_1", None)
    else:
        path, embedding = POOLED_LDM, getattr(unet, "label_emb", None)
        # a class label is looked up in a table instead
        if isinstance(embedding, nn.Sequential) and context_dim != _SD2_WIDTH:
            module = unet.get_submodule(path)
    if module is None or module.in_features <= _sizes_width(unet, context_dim):
        return None
    return Layer(POOLED_KEY, POOLED_LDM, path, plain_linear(module, path))


def _is_cross_attention(unet: nn.Module, path: str, module: nn.Module) -> bool:
    if not hasattr(module, "to_k") or not hasattr(module, "heads"):
        return False
    declared = getattr(module, "is_cross_attention", None)
    if isinstance(declared, bool):  # diffusers knows
        return declared
    if path.endswith("attn2"):
        return True
    parent = unet.get_submodule(path.rpartition(".")[0])
    return bool(getattr(parent, "disable_self_attn", False))


def _order(name: str) -> tuple[int, ...]:
    stage = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}[name.split(".", 1)[0]]
    return (stage, *(int(number) for number in re.findall(r"\d+", name)))


def _family(unet: nn.Module, sites: int, context_dim: int) -> str:
    # a vector is added to the time embedding: `add_embedding` in diffusers, `label_emb` in LDM
    pooled = getattr(unet, "add_embedding", None) is not None or getattr(unet, "label_emb", None) is not None
    if pooled:
        return "sdxl" if context_dim == 2048 else "other"
    return {(768, 16): "sd1", (1024, 16): "sd2"}.get((context_dim, sites), "other")


# -- paths of transformers in this UNet -> (canonical name, LDM name) ---------------------------------------------


def _diffusers_places(unet: nn.Module) -> dict[str, tuple[str, str]]:
    places: dict[str, tuple[str, str]] = {}
    entry = 1  # input_blocks.0 is the first convolution
    for i, block in enumerate(unet.down_blocks):  # type: ignore[arg-type]
        for j in range(len(getattr(block, "attentions", None) or ())):
            name = f"down_blocks.{i}.attentions.{j}"
            places[name] = (name, f"input_blocks.{entry + j}.1")
        entry += len(block.resnets) + (1 if getattr(block, "downsamplers", None) else 0)
    middle = getattr(unet, "mid_block", None)
    for j in range(len(getattr(middle, "attentions", None) or ())):
        places[f"mid_block.attentions.{j}"] = (f"mid_block.attentions.{j}", f"middle_block.{1 + 2 * j}")
    entry = 0
    for i, block in enumerate(unet.up_blocks):  # type: ignore[arg-type]
        for j in range(len(getattr(block, "attentions", None) or ())):
            name = f"up_blocks.{i}.attentions.{j}"
            places[name] = (name, f"output_blocks.{entry + j}.1")
        entry += len(block.resnets)
    return places


def _has_transformer(module: nn.Module) -> bool:
    return hasattr(module, "transformer_blocks")


def _resamples(module: nn.Module) -> bool:
    # a resampling layer (by class name), or a residual block that resamples (`resblock_updown`)
    return type(module).__name__ in ("Downsample", "Upsample") or bool(getattr(module, "updown", False))


def _ldm_places(unet: nn.Module) -> dict[str, tuple[str, str]]:
    places: dict[str, tuple[str, str]] = {}
    for stage, canonical in (("input_blocks", "down_blocks"), ("output_blocks", "up_blocks")):
        level, layer = 0, 0
        for k, entry in enumerate(getattr(unet, stage)):
            parts = list(entry.named_children())
            if stage == "input_blocks" and k == 0:
                continue  # the first convolution
            for index, part in parts:
                if _has_transformer(part):
                    path = f"{stage}.{k}.{index}"
                    places[path] = (f"{canonical}.{level}.attentions.{layer}", path)
            layer += 1
            if any(_resamples(part) for _, part in parts):
                level, layer = level + 1, 0
    attention = 0
    for index, part in getattr(unet, "middle_block", nn.Sequential()).named_children():
        if _has_transformer(part):
            places[f"middle_block.{index}"] = (f"mid_block.attentions.{attention}", f"middle_block.{index}")
            attention += 1
    return places


# -- conversion of names without a model, for files ---------------------------------------------------------------

_CANONICAL = re.compile(
    r"^(down_blocks|up_blocks)\.(\d+)\.attentions\.(\d+)\.(.+)$|^(mid_block)\.attentions\.(\d+)\.(.+)$"
)
_LDM = re.compile(r"^(input_blocks|output_blocks|middle_block)\.(\d+)\.(\d+\.)?(.+)$")


def ldm_from_canonical(name: str, layers: int = 2) -> str:
    """Convert a canonical site name or key to LDM naming.

    Prefer a survey's ``ldm_name`` where the model is at hand: it does not depend on ``layers``.

    Args:
        name: Canonical name or key.
        layers: Residual layers per block (2 in SD1, SD2 and SDXL).

    Raises:
        ModelError: If ``name`` is not the name of a cross-attention site.
    """
    if name == POOLED_KEY:
        return POOLED_LDM
    if (match := _CANONICAL.match(name)) is None:
        raise ModelError(f"'{name}' is not the name of a cross-attention site.")
    stage, i, j, rest, _, middle, middle_rest = match.groups()
    if stage is None:
        return f"middle_block.{1 + 2 * int(middle)}.{middle_rest}"
    if stage == "down_blocks":
        return f"input_blocks.{1 + (layers + 1) * int(i) + int(j)}.1.{rest}"
    return f"output_blocks.{(layers + 1) * int(i) + int(j)}.1.{rest}"


def canonical_from_ldm(name: str, layers: int = 2) -> str:
    """The inverse of :func:`ldm_from_canonical`."""
    if name == POOLED_LDM:
        return POOLED_KEY
    match = _LDM.match(name)
    if match is not None:
        stage, k, index, rest = match.groups()
        block, layer = divmod(int(k) - (1 if stage == "input_blocks" else 0), layers + 1)
        if stage == "middle_block" and index is None and int(k) % 2:
            return f"mid_block.attentions.{(int(k) - 1) // 2}.{rest}"
        if stage == "input_blocks" and index == "1." and block >= 0 and layer < layers:
            return f"down_blocks.{block}.attentions.{layer}.{rest}"
        if stage == "output_blocks" and index == "1.":
            return f"up_blocks.{block}.attentions.{layer}.{rest}"
    raise ModelError(f"'{name}' is not the name of a cross-attention site in a UNet with {layers} layers a block.")
