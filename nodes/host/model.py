"""A MODEL as the core's latent diffusion model, surveyed and patched.

The host keeps one loaded copy of a model's weights for all of its MODELs. :func:`latent_diffusion` works on a detached
view of that copy, which gradients may flow through, and restores the host's own tensors afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from ...core.errors import ModelError, PatchError, listed
from ...core.models.host_weights import (
    PLAIN_DTYPES,
    HostLatentDiffusion,
    check_channels,
    detached_view,
    usual_latent_side,
)
from ...core.models.latent_diffusion import LatentDiffusion, hash_of_weights
from ...core.models.text_encoders import TextEncoder, TextStates
from ...core.models.unet import PROJECTIONS, UNetSurvey, survey
from ...core.patch.patch import Patch
from .autoencoder import HostAutoencoder
from .text import HostText, opened_text

__all__ = ["latent_diffusion", "patched_weights", "surveyed", "surviving_share", "weights_hash", "with_lora"]

_UNET = "diffusion_model."


def patched_weights(model: Any) -> int:
    """How many of a MODEL's weights carry patches (LoRAs and the like)."""
    return len(model.patches)


def _static(model: Any) -> Any:
    """A MODEL whose weights stay where they are loaded; newer hosts stream them by default."""
    if not getattr(model, "is_dynamic", lambda: False)():
        return model
    try:
        return model.clone(disable_dynamic=True)
    except TypeError:
        raise ModelError(
            "This ComfyUI streams the model's weights (dynamic VRAM) and cannot hold them still: start it with "
            "--disable-dynamic-vram."
        ) from None


def _schedule(patcher: Any) -> tuple[Tensor, str]:
    """``α̅`` of the model's own noise schedule (as a sampling node has set it, if one has) and its prediction type."""
    sampling = patcher.get_model_object("model_sampling")
    types = comfy.model_sampling
    # the other kinds are subclasses of these two; not every host knows all of them
    others = tuple(getattr(types, name) for name in ("EDM", "X0") if hasattr(types, name))
    prediction = None
    if isinstance(sampling, types.EPS) and not isinstance(sampling, others):
        prediction = "v_prediction" if isinstance(sampling, types.V_PREDICTION) else "epsilon"
    if prediction is None or not isinstance(sampling, types.ModelSamplingDiscrete):
        raise ModelError(
            f"The sampling of this MODEL ({type(sampling).__name__}) is not supported: only discrete epsilon- and "
            "v-prediction models are, such as Stable Diffusion 1, 2 and XL."
        )
    return (1 / (sampling.sigmas.detach().float() ** 2 + 1)).clone(), prediction


def _latent_shape(patcher: Any, family: str, prediction: str) -> tuple[int, int, int]:
    side = _own(patcher.model.model_config, "forget_concept_side", usual_latent_side(family, prediction))
    return (int(patcher.model.latent_format.latent_channels), side, side)


def _own(config: Any, name: str, usual: Any) -> Any:
    """What this pack says of a model of its own, else ``usual``: the host's configs themselves have ``None``, and a
    warning, for every name."""
    return getattr(type(config), name, usual)


def surveyed(model: Any) -> UNetSurvey:
    """The cross-attention sites of a MODEL; nothing is loaded. Raises :class:`ModelError` where it has none."""
    if model is None:
        raise ModelError("The MODEL that came in is empty: the checkpoint has none.")
    unet = getattr(model.model, "diffusion_model", None)
    if not isinstance(unet, nn.Module):
        raise ModelError("The MODEL that came in has no diffusion model in it.")
    return survey(unet)


@contextmanager
def latent_diffusion(
    model: Any, clip: Any, vae: Any = None, differentiable_text: bool = False
) -> Iterator[LatentDiffusion]:
    """MODEL, CLIP and VAE, loaded, as the core's model with gradients on; restored bit-exactly however the block ends.

    Every parameter of the UNet is, inside the block, a frozen ``Parameter`` on the same memory: the host's own are
    inference tensors, which autograd refuses. Weights include the patches that MODEL carries. The host's interruption
    passes through.

    Args:
        differentiable_text: Copy the text encoder so that gradients flow through it, where that is possible (see
            :func:`opened_text`); textual inversion and attacks need it.

    Raises:
        ModelError: For a model without cross-attention, and for a CLIP of another model.
    """
    if model is None or clip is None:
        raise ModelError(f"The {'MODEL' if model is None else 'CLIP'} that came in is empty: the checkpoint has none.")
    found = surveyed(model)  # first of all: its refusals need nothing loaded
    if vae is not None and getattr(vae, "first_stage_model", None) is None:
        raise ModelError("The VAE that came in is empty: the checkpoint has none.")
    patcher = _static(model)
    base, unet = patcher.model, patcher.model.diffusion_model
    alphas, prediction = _schedule(patcher)
    shape = _latent_shape(patcher, found.family, prediction)
    # room for a few pictures' activations; all at once, so that none pushes out another
    room = patcher.memory_required([8, *shape])
    wanted = [patcher, clip.patcher] + ([] if vae is None else [vae.patcher])
    management.load_models_gpu(wanted, memory_required=room, force_full_load=True)
    dtype = base.manual_cast_dtype or base.get_dtype()
    if dtype not in PLAIN_DTYPES:
        dtype = torch.float32
    text = HostText(clip, found.family, bool(base.adm_channels))

    def predict(x: Tensor, timesteps: Tensor, states: TextStates) -> Tensor:
        check_channels(x, unet)
        height, width = x.shape[-2] * 8, x.shape[-1] * 8
        vector = None
        if base.adm_channels:
            vector = base.encode_adm(pooled_output=states.pooled, width=width, height=height, device=x.device)
            vector = vector.to(x.device, x.dtype)
        return unet(x, timesteps.float(), context=states.hidden, y=vector, transformer_options={})

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(detached_view(unet))
        stack.enter_context(_effective(patcher, unet, dtype))
        _check_family(found, text.encode([""]), bool(base.adm_channels))
        reader: TextEncoder = text
        if differentiable_text:
            reader = opened_text(clip, text, patcher.load_device) or text
        yield HostLatentDiffusion(
            unet,
            reader,
            alphas,
            prediction,
            device=patcher.load_device,
            dtype=dtype,
            vae=None if vae is None else HostAutoencoder(vae, base.latent_format),
            latent_shape=shape,
            guidance=_own(base.model_config, "forget_concept_guidance", 7.5),
            name=_own(base.model_config, "forget_concept_name", type(base).__name__),
            eps_model=predict,
        )


def _check_family(found: UNetSurvey, states: TextStates, takes_pooled: bool) -> None:
    width = states.hidden.shape[-1]
    if width != found.context_dim or states.hidden.shape[1] != HostText.max_length:
        raise ModelError(
            f"MODEL and CLIP are of different families: the MODEL reads text states of width {found.context_dim} "
            f"(family {found.family}), the CLIP gives {width}. Connect the CLIP of the same checkpoint."
        )
    if takes_pooled and states.pooled is None:
        raise ModelError("This MODEL also takes a pooled text vector (as SDXL), and the CLIP gives none.")


@contextmanager
def _effective(patcher: Any, unet: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Cross-attention weights as they take effect, where the host keeps them otherwise: the host's own come back.

    That is with little memory (left elsewhere, patches worked in at each use) and in narrow formats (fp8 with its
    scale). Everywhere else the loaded weights have the patches in them already, and nothing is done.
    """
    odd = []
    for site in survey(unet):
        for which in PROJECTIONS:
            layer = site.projection(which)
            waiting = getattr(layer, "weight_function", None)
            if waiting or layer.weight.device != patcher.load_device or layer.weight.dtype not in PLAIN_DTYPES:
                odd.append((f"{_UNET}{site.weight_path(which)}.weight", layer))
    kept: list[tuple[Any, Any, Any]] = []
    entries = patcher.get_key_patches(_UNET) if odd else {}
    try:
        for key, layer in odd:
            (weight, convert), *patches = entries[key]
            with torch.no_grad():
                wide = management.cast_to_device(weight, patcher.load_device, torch.float32, copy=True)
                wide = comfy.lora.calculate_weight(patches, convert(wide, inplace=True), key)
                value = nn.Parameter(wide.to(dtype), requires_grad=False)
            functions = layer.__dict__.get("weight_function")
            kept.append((layer, layer.weight, functions))
            layer._parameters["weight"] = value
            if functions is not None:
                layer.weight_function = []  # type: ignore[assignment]
        yield
    finally:
        for module, parameter, functions in kept:
            module._parameters["weight"] = parameter
            if functions is not None:
                module.weight_function = functions


def with_lora(model: Any, lora: Mapping[str, Tensor], strength: float = 1.0) -> Any:
    """A MODEL with a LoRA's state dict on, through the very path of the stock loaders; the one given stays as it is.

    Raises :class:`PatchError` unless every layer of the LoRA found its weight.
    """
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    loaded = comfy.lora.load_lora(dict(lora), names)
    patched = model.clone()
    taken = set(patched.add_patches(loaded, strength))
    layers = [name[: -len(".lora_up.weight")] for name in lora if name.endswith(".lora_up.weight")]
    lost = [layer for layer in layers if names.get(layer) not in taken]
    if lost or not layers:
        raise PatchError(
            f"The host did not take the patch: {len(lost)} of {len(layers)} layers match no weight of this MODEL, such "
            f"as {listed(lost, 2)}."
        )
    return patched


def weights_hash(model: Any) -> str:
    """The hash by which a patch knows its base, of a MODEL's own weights, without any patches on it."""
    entries = model.get_key_patches(_UNET)

    def own(path: str) -> Tensor:
        weight, convert = entries[f"{_UNET}{path}.weight"][0]
        return weight if type(weight) in (Tensor, nn.Parameter) else convert(weight)

    found = surveyed(model)
    return hash_of_weights((site.key(which), own(site.weight_path(which))) for site in found for which in PROJECTIONS)


def surviving_share(model: Any, patch: Patch, strength: float = 1.0) -> tuple[float, str] | None:
    """Share of the edit that is left once the host has rounded it into the weights, and the dtype these have.

    ``⟨Δ', Δ⟩ / ‖Δ‖²`` with the host's own rounding, on top of what the MODEL carries already. ``None`` where the host
    keeps the weights in a form of its own (quantised), which nothing is rounded into by this path.
    """
    found = surveyed(model)
    entries = model.get_key_patches(_UNET)
    seed = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed
    kept = total = 0.0
    dtypes: dict[torch.dtype, None] = {}
    for canonical, factor in patch.factors.items():
        layer = found.layer(canonical)
        key = f"{_UNET}{layer.path}.weight"
        (weight, convert), *patches = entries[key]
        if type(weight) not in (Tensor, nn.Parameter):
            return None
        with torch.no_grad():
            wide = management.cast_to_device(weight, model.load_device, torch.float32, copy=True)
            wide = comfy.lora.calculate_weight(patches, convert(wide, inplace=True), key)
            delta = strength * factor.to(wide.device, torch.float32).delta()
            before = comfy.float.stochastic_rounding(wide, weight.dtype, seed=seed(key)).float()
            after = comfy.float.stochastic_rounding(wide + delta, weight.dtype, seed=seed(key)).float()
            kept += float(((after - before) * delta).sum(dtype=torch.float64))
            total += float(delta.square().sum(dtype=torch.float64))
        dtypes[weight.dtype] = None
    if total == 0:
        return None
    return kept / total, " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
