"""Patches through peft: adapter folders, and a patch as a named adapter on a UNet.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` as ``PeftModel.from_pretrained`` reads them,
with the layers under their diffusers paths and ``lora_alpha = r`` everywhere, so that peft's scale is 1. Ranks that
differ by layer stand in ``rank_pattern`` and ``alpha_pattern``.

On a UNet, a patch is a peft adapter: diffusers' ``set_adapters``, ``delete_adapters`` and stacking work on it. peft is
imported only in this file, and only when a function is called.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError, listed
from ..files.json_text import parse_json
from ..files.reading import read_text
from ..files.safetensors_io import read_safetensors, write_safetensors
from ..files.writing import write_folder
from ..models.model_survey import ModelSurvey
from ..models.survey import survey
from ..patch.apply import PatchHandle
from ..patch.low_rank import LowRank
from ..patch.outlets import attach_with, saves_as
from ..patch.patch import Patch
from . import kohya, naming
from .adapter_config import compiled_pattern

__all__ = ["attach", "is_adapter_folder", "load", "save"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def is_adapter_folder(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a folder with a peft adapter in it."""
    return (Path(path) / _CONFIG).is_file()


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise PatchError(f"Adapter folders and named adapters need peft ({error}): pip install peft.") from error
    return peft


def _config(ranks: Mapping[str, int]) -> Any:
    """The ``LoraConfig`` of layers with these ranks, by path in the UNet."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # anchored: peft also matches the ends of longer paths
    others = {f"^{re.escape(path)}$": rank for path, rank in ranks.items() if rank != usual}
    return _peft().LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=list(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
    )


# -- folders -----------------------------------------------------------------------------------------------------


@saves_as("peft")
def save(
    patch: Patch,
    path: str | os.PathLike[str],
    survey: ModelSurvey | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a patch as a peft adapter folder, whole or not at all.

    Args:
        patch: the patch; a factor of rank 0 is left out, since peft has none.
        path: the folder. One that holds an adapter already is replaced, an empty one is filled.
        survey: not needed; layers are written under their diffusers paths.
        dtype: of the weights in the file.

    Raises:
        PatchError: peft is missing, the folder holds something else, a value does not fit into ``dtype``, or the place
            cannot be written.
    """
    patch.check_finite()
    target = Path(path)
    if target.suffix.lower() == ".safetensors":
        raise PatchError(f"'{path}' cannot be a peft adapter: it is a folder, so leave '.safetensors' out of its name.")
    if target.is_dir() and any(target.iterdir()) and not is_adapter_folder(target):
        raise PatchError(f"'{path}' cannot be written: the folder holds other files; name an empty or a new one.")
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for key, factor in patch.factors.items():
        if factor.rank == 0:
            continue
        layer = naming.diffusers_path(key, patch.about.family) or (key + ".0" if key.endswith(".to_out") else key)
        ranks[layer] = factor.rank
        up, down = factor.up.detach().cpu().to(dtype), factor.down.detach().cpu().to(dtype)
        if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise PatchError(
                f"The patch does not fit into {str(dtype).removeprefix('torch.')} at {key}: save it wider."
            )
        state[f"{_PREFIX}{layer}.lora_A.weight"] = down.contiguous()
        state[f"{_PREFIX}{layer}.lora_B.weight"] = up.contiguous()
    if not state:
        raise PatchError("This patch changes nothing: all of its factors have rank 0.")
    config = _config(ranks)
    if target.exists() and not target.is_dir():
        raise PatchError(f"'{path}' cannot be written: a peft adapter is a folder, and this is a file.")

    def fill(folder: Path) -> None:
        config.save_pretrained(str(folder))
        write_safetensors(state, folder / _WEIGHTS, {**patch.metadata, "format": "pt"})

    write_folder(target, fill, (_WEIGHTS, _CONFIG), PatchError)


def load(path: str | os.PathLike[str], survey: ModelSurvey | None = None) -> Patch:
    """Read a peft adapter folder as a patch.

    Args:
        path: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        survey: gives the LDM names of a UNet that does not have two layers a block.

    Returns:
        The patch; peft's scale (``lora_alpha / r``, or by ``√r`` with rank-stabilised LoRA) is in its factors.

    Raises:
        PatchError: the folder is incomplete or holds a pickle, peft is missing, or the adapter is not a plain LoRA of
            linear layers of the UNet's transformer blocks.
    """
    folder = Path(path)
    if not is_adapter_folder(folder):
        raise PatchError(
            f"'{path}' is a folder without {_CONFIG}, so it is not a peft adapter: give a file, or an adapter's folder."
        )
    if not (folder / _WEIGHTS).is_file():
        # peft would fall back to a pickle, or to a download of that name
        raise PatchError(f"'{path}' has no {_WEIGHTS}: only adapters saved as safetensors are read.")
    peft = _peft()
    tensors, metadata = read_safetensors(folder / _WEIGHTS)
    try:
        parse_json(read_text(folder / _CONFIG, "The configuration", PatchError))
        config = peft.PeftConfig.from_pretrained(str(folder))
    except PatchError:
        raise
    except Exception as error:  # peft raises whatever its parts raise; told in one sentence, with the cause kept
        raise PatchError(f"The adapter '{path}' cannot be read: {error}") from error
    if not isinstance(config, peft.LoraConfig):
        raise PatchError(f"The adapter '{path}' is a {config.peft_type}: only LoRA adapters are read.")
    for setting, plain in (("use_dora", False), ("bias", "none"), ("modules_to_save", None), ("lora_bias", False)):
        if (getattr(config, setting, plain) or plain) != plain:
            raise PatchError(f"The adapter '{path}' is more than a plain LoRA ('{setting}' is set): it is not read.")
    scaled = dict(tensors)
    for name, down in tensors.items():
        layer, found, _ = name.rpartition(".lora_A.weight")
        if not found:
            continue
        inner = layer.removeprefix(_PREFIX)
        rank = down.shape[0]
        alpha = _alpha(config, inner, str(path))
        # as kohya counts, alpha / rank is the scale
        scaled[layer + ".alpha"] = torch.tensor(alpha * (rank**0.5 if config.use_rslora else 1.0))
    metadata.pop("format", None)
    return kohya.from_state(scaled, metadata, survey, str(path))


def _alpha(config: Any, layer: str, source: str) -> float:
    """The alpha that peft takes for a layer: that of the first pattern that its path ends with."""
    try:
        patterns = ((compiled_pattern(pattern), value) for pattern, value in (config.alpha_pattern or {}).items())
        alpha = float(next((value for pattern, value in patterns if pattern.match(layer)), config.lora_alpha))
        if not math.isfinite(alpha):
            raise ValueError(f"{alpha} is not finite")
    except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise PatchError(f"The alpha in the configuration of '{source}' cannot be read: {error}.") from error
    return alpha


# -- adapters on a UNet ------------------------------------------------------------------------------------------


@attach_with
def attach(patch: Patch, unet: nn.Module, name: str, strength: float = 1.0) -> PatchHandle:
    """Put a patch on a raw UNet as the peft adapter ``name``, active beside those that are active already.

    The factors stay in float32 whatever the UNet's dtype. The base weights are not touched, and no random number is
    drawn.

    Args:
        patch: the patch; it must fit the UNet.
        unet: a diffusers ``UNet2DConditionModel``, or a raw UNet in LDM naming.
        name: of the adapter, for ``set_adapters`` and ``delete_adapters``.
        strength: its weight, until ``set_adapters`` says another one.

    Returns:
        A handle whose ``remove()`` deletes the adapter; the last one leaves the UNet with its own layers again.

    Raises:
        PatchError: the name is taken or impossible, the patch does not fit, peft is missing or cannot wrap a layer, or
            the UNet's adapters are fused or switched off.
    """
    peft = _peft()
    _check_name(unet, name)
    layers = _adapter_layers(unet)
    if any(layer.merged for layer in layers.values()):
        raise PatchError("This model has adapters fused into its weights: call unfuse_lora() first.")
    if any(layer.disable_adapters for layer in layers.values()):
        raise PatchError("The adapters of this model are switched off: call enable_adapters() or enable_lora() first.")
    active = list(dict.fromkeys(one for layer in layers.values() for one in layer.active_adapters))
    with _own_layers(unet):
        found = survey(unet)
        patch.check_fits(found)
        factors = {found.layer(key).path: factor for key, factor in patch.factors.items() if factor.rank}
    if not factors:
        raise PatchError("This patch changes nothing: all of its factors have rank 0.")
    own = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    try:
        config = _config({path: factor.rank for path, factor in factors.items()})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            # no memory for the weights that peft would draw: the factors take their place
            peft.inject_adapter_in_model(config, unet, name, low_cpu_mem_usage=True)
        layers = _adapter_layers(unet)
        for path, factor in factors.items():
            _fill(layers[path], name, factor)
    except Exception as error:
        _detach(unet, name)
        if isinstance(error, PatchError):
            raise
        raise PatchError(f"peft cannot put the adapter '{name}' on this model: {error}") from error
    finally:
        for parameter, trainable in own:  # peft freezes what is not an adapter
            parameter.requires_grad_(trainable)
    for layer in layers.values():
        layer.set_adapter([*active, name])
        layer.set_scale(name, strength)
    for path in factors:
        for part in (layers[path].lora_A[name], layers[path].lora_B[name]):
            part.requires_grad_(False)  # set_adapter makes active ones trainable
    _tell_diffusers(unet, True)
    handle = PatchHandle()
    handle.add(_Adapter(unet, name))
    return handle


class _Adapter:
    """A named adapter on a UNet, as a :class:`PatchHandle` removes it."""

    def __init__(self, unet: nn.Module, name: str) -> None:
        self.unet, self.name = unet, name

    def remove(self) -> None:
        if any(layer.merged for layer in _adapter_layers(self.unet).values()):
            raise PatchError(f"The adapter '{self.name}' is fused into the weights: call unfuse_lora() first.")
        _detach(self.unet, self.name)


def _check_name(unet: nn.Module, name: str) -> None:
    # names of an adapter are names of submodules
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise PatchError(
            f"An adapter cannot be called '{name}', which is empty, has a dot or is a name of torch's modules: give "
            "another one, such as 'no-van-gogh'."
        )
    taken = list(getattr(unet, "peft_config", None) or {})
    if name in taken:
        raise PatchError(
            f"This model has an adapter '{name}' already ({listed(taken)}): give another name, or delete it first."
        )


def _adapter_layers(unet: nn.Module) -> dict[str, Any]:
    """peft's layers in a UNet by their path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in unet.named_modules() if isinstance(module, BaseTunerLayer)}


def _fill(layer: Any, name: str, factor: LowRank) -> None:
    """Make the factors the adapter's weights, float32 (float64 stays) on the layer's device."""
    device = layer.get_base_layer().weight.device
    dtype = torch.float64 if factor.up.dtype == torch.float64 else torch.float32
    for module, value in ((layer.lora_A[name], factor.down), (layer.lora_B[name], factor.up)):
        # copied: what moves or trains the adapter must not change the patch
        module.weight = nn.Parameter(value.detach().to(device, dtype, copy=True), requires_grad=False)


def _tell_diffusers(unet: Any, loaded: bool) -> None:
    if hasattr(unet, "_hf_peft_config_loaded"):  # how diffusers' own loader notes that there is an adapter
        unet._hf_peft_config_loaded = loaded


def _put(unet: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(unet.get_submodule(parent), name, module)


@contextlib.contextmanager
def _own_layers(unet: nn.Module) -> Iterator[None]:
    """The UNet with its own linear layers where peft has wrapped them, for as long as it is looked at."""
    wrapped = _adapter_layers(unet)
    for path, layer in wrapped.items():
        _put(unet, path, layer.get_base_layer())
    try:
        yield
    finally:
        for path, layer in wrapped.items():
            _put(unet, path, layer)


def _detach(unet: nn.Module, name: str) -> None:
    """Delete an adapter; without any left, the UNet has its own layers again."""
    configs: dict[str, Any] = getattr(unet, "peft_config", None) or {}
    for layer in _adapter_layers(unet).values():
        # first, or peft would switch on another adapter in its place
        layer.set_adapter([one for one in layer.active_adapters if one != name])
        layer.delete_adapter(name)
    configs.pop(name, None)
    if configs:
        return
    for path, layer in _adapter_layers(unet).items():
        _put(unet, path, layer.get_base_layer())
    if "peft_config" in vars(unet):
        del unet.peft_config
    _tell_diffusers(unet, False)
