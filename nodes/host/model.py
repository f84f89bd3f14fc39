"""Adapter from a ComfyUI MODEL to the core's latent diffusion model.

The host keeps one loaded copy of a model's weights for all its MODELs. :func:`latent_diffusion` replaces them with a
detached view of the same memory, through which gradients can flow, and restores the host's own tensors afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from ...core.errors import ModelError, PatchError, UnknownFamilyError, listed
from ...core.models.host_weights import (
    PLAIN_DTYPES,
    HostLatentDiffusion,
    check_channels,
    detached_view,
    usual_latent_side,
)
from ...core.models.latent_diffusion import LatentDiffusion, hash_of_weights, hashed_keys
from ...core.models.model_survey import PROJECTIONS, ModelSurvey
from ...core.models.prediction_marks import check_prediction
from ...core.models.survey import survey
from ...core.models.text_encoders import TextEncoder
from ...core.models.text_states import TextStates
from ...core.models.transformer import TransformerSurvey
from ...core.models.unet import survey_unet
from ...core.patch.patch import Patch
from .autoencoder import HostAutoencoder
from .declared import declared
from .recording import adopt_layers, record_text_entries
from .text import HostText, differentiable_copy
from .transformer import transformer_diffusion
from .weights import ORDINARY, UNET, dequantised, effective_weight, stored_weight

__all__ = ["latent_diffusion", "patched_weights", "surveyed", "surviving_share", "weights_hash", "with_lora"]


def patched_weights(model: Any) -> int:
    """How many of a MODEL's weights carry patches (LoRAs and the like)."""
    return len(model.patches)


def _static(model: Any) -> Any:
    """A MODEL whose weights stay on the device; newer hosts stream them by default."""
    if not getattr(model, "is_dynamic", lambda: False)():
        return model
    try:
        return model.clone(disable_dynamic=True)
    except TypeError:
        raise ModelError(
            "This ComfyUI streams the model's weights (dynamic VRAM) and cannot keep them on the device: start it "
            "with --disable-dynamic-vram."
        ) from None


def _schedule(patcher: Any) -> tuple[Tensor, str]:
    """``α̅`` of the model's noise schedule, as set by a sampling node if there is one, and the prediction type."""
    sampling = patcher.get_model_object("model_sampling")
    types = comfy.model_sampling
    # other types are subclasses of these; not every host defines all of them
    others = tuple(getattr(types, name) for name in ("EDM", "X0") if hasattr(types, name))
    prediction = None
    if isinstance(sampling, types.EPS) and not isinstance(sampling, others):
        prediction = "v_prediction" if isinstance(sampling, types.V_PREDICTION) else "epsilon"
    if prediction is None or not isinstance(sampling, types.ModelSamplingDiscrete):
        raise ModelError(
            f"The sampling of this MODEL ({type(sampling).__name__}) is not supported: only discrete epsilon- and "
            "v-prediction models are, such as Stable Diffusion 1, 2 and XL."
        )
    # newer hosts know how to load a model again
    _, arguments, *_ = getattr(patcher, "cached_patcher_init", None) or (None, ())
    if arguments and isinstance(arguments[0], (str, Path)):
        check_prediction(Path(arguments[0]), prediction, "put ModelSamplingDiscrete with v_prediction after the loader")
    return (1 / (sampling.sigmas.detach().float() ** 2 + 1)).clone(), prediction


def _latent_shape(patcher: Any, family: str, prediction: str) -> tuple[int, int, int]:
    side = declared(patcher.model.model_config, "forget_concept_side", usual_latent_side(family, prediction))
    return (int(patcher.model.latent_format.latent_channels), side, side)


def surveyed(model: Any, lora: Mapping[str, Tensor] | None = None) -> ModelSurvey:
    """The survey of a MODEL, a UNet or a diffusion transformer; loads nothing.

    Args:
        model: The MODEL.
        lora: A patch for it, which tells where a MODEL of no known family reads the text.

    Raises:
        ModelError: If the MODEL is empty or of no supported family.
    """
    if model is None:
        raise ModelError("The input MODEL is empty, because the checkpoint has none: choose another checkpoint.")
    unet = getattr(model.model, "diffusion_model", None)
    if not isinstance(unet, nn.Module):
        raise ModelError(
            "The input MODEL contains no diffusion model: connect the MODEL of a Stable Diffusion checkpoint."
        )
    try:
        return survey(unet)
    except UnknownFamilyError:
        if lora is None or not adopt_layers(model, lora):
            raise
        return survey(unet)


def _surveyed_with(model: Any, clip: Any) -> ModelSurvey:
    """The survey of a MODEL; where its family is not known, its text entries are recorded with its CLIP."""
    try:
        return surveyed(model)
    except UnknownFamilyError:
        record_text_entries(model, clip)
        return surveyed(model)


@contextmanager
def latent_diffusion(
    model: Any, clip: Any, vae: Any = None, differentiable_text: bool = False
) -> Iterator[LatentDiffusion]:
    """Load MODEL, CLIP and VAE as the core's model with gradients enabled; the block's end restores them bit-exactly.

    Inside the block, every parameter of the UNet is a frozen ``Parameter`` on the same memory: the host's own are
    inference tensors, which autograd rejects. The weights include the patches that the MODEL carries. The host's
    interruption exception passes through. Of a diffusion transformer nothing is touched (:mod:`.transformer`).

    Args:
        differentiable_text: Copy the text encoder so that gradients can flow through it, if possible (see
            :func:`differentiable_copy`); textual inversion and attacks need it.

    Raises:
        ModelError: For a model without cross-attention, and for a CLIP of another model.
    """
    if model is None or clip is None:
        raise ModelError(
            f"The input {'MODEL' if model is None else 'CLIP'} is empty, because the checkpoint has none: load one."
        )
    if vae is not None and getattr(vae, "first_stage_model", None) is None:
        raise ModelError("The input VAE is empty, because the checkpoint has none: load one.")
    found = _surveyed_with(model, clip)  # it raises before a known model is loaded
    if isinstance(found, TransformerSurvey):
        with torch.inference_mode(False), torch.enable_grad():
            yield transformer_diffusion(model, clip, vae, found)
        return
    patcher = _static(model)
    base, unet = patcher.model, patcher.model.diffusion_model
    alphas, prediction = _schedule(patcher)
    shape = _latent_shape(patcher, found.family, prediction)
    # memory for the activations of a few pictures; loaded in one call, so that no model unloads another
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
        stack.enter_context(_effective_weights(patcher, unet, dtype))
        _check_family(found, text.encode([""]), bool(base.adm_channels))
        reader: TextEncoder = text
        if differentiable_text:
            reader = differentiable_copy(clip, text, patcher.load_device) or text
        yield HostLatentDiffusion(
            unet,
            reader,
            alphas,
            prediction,
            device=patcher.load_device,
            dtype=dtype,
            vae=None if vae is None else HostAutoencoder(vae, base.latent_format),
            latent_shape=shape,
            guidance=declared(base.model_config, "forget_concept_guidance", 7.5),
            name=declared(base.model_config, "forget_concept_name", type(base).__name__),
            eps_model=predict,
        )


def _check_family(found: ModelSurvey, states: TextStates, takes_pooled: bool) -> None:
    width = states.hidden.shape[-1]
    if width != found.context_dim or states.hidden.shape[1] != HostText.max_length:
        raise ModelError(
            f"MODEL and CLIP are of different families: the MODEL expects text states of width {found.context_dim} "
            f"(family {found.family}), the CLIP returns {width}. Connect the CLIP of the same checkpoint."
        )
    if takes_pooled and states.pooled is None:
        raise ModelError(
            "This MODEL needs a pooled text vector (as SDXL does), but the CLIP returns none: connect the CLIP of the "
            "same checkpoint."
        )


@contextmanager
def _effective_weights(patcher: Any, unet: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Materialize the effective weights of the layers that are edited where the loaded tensors differ from them.

    They differ when memory is low (weights stay offloaded, patches are merged at each use) and in narrow formats (fp8
    and int8 with a scale). Otherwise the loaded weights already include the patches. The host's tensors are restored
    afterwards.
    """
    to_replace = []
    found = survey_unet(unet)
    layers = [found.layer(site.key(which)) for site in found for which in PROJECTIONS]
    for part in [*layers, *([] if found.pooled is None else [found.pooled])]:
        layer = part.module
        waiting = getattr(layer, "weight_function", None)
        plain = type(layer.weight) in ORDINARY and layer.weight.dtype in PLAIN_DTYPES
        if waiting or layer.weight.device != patcher.load_device or not plain:
            to_replace.append((f"{UNET}{part.path}.weight", layer))
    host_tensors: list[tuple[Any, Any, Any, Any]] = []
    try:
        for key, layer in to_replace:
            with torch.no_grad():
                value = nn.Parameter(effective_weight(patcher, key).to(dtype), requires_grad=False)
            functions, layout = layer.__dict__.get("weight_function"), layer.__dict__.get("layout_type")
            host_tensors.append((layer, layer.weight, functions, layout))
            layer._parameters["weight"] = value
            if functions is not None:
                layer.weight_function = []  # type: ignore[assignment]
            if layout is not None:  # it would quantise its inputs too
                layer.layout_type = None  # type: ignore[assignment]
        yield
    finally:
        for module, parameter, functions, layout in host_tensors:
            module._parameters["weight"] = parameter
            if functions is not None:
                module.weight_function = functions
            if layout is not None:
                module.layout_type = layout


def with_lora(model: Any, lora: Mapping[str, Tensor], strength: float = 1.0) -> Any:
    """Return a clone of a MODEL with a LoRA's state dict applied the way the stock loaders do it.

    Raises:
        PatchError: If a layer of the LoRA matches no weight.
    """
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    loaded = comfy.lora.load_lora(dict(lora), names)
    patched = model.clone()
    taken = set(patched.add_patches(loaded, strength))
    layers = [name[: -len(".lora_up.weight")] for name in lora if name.endswith(".lora_up.weight")]
    lost = [layer for layer in layers if names.get(layer) not in taken]
    if lost or not layers:
        raise PatchError(
            f"The patch does not fit this MODEL: {len(lost)} of {len(layers)} layers match no weight, such as "
            f"{listed(lost, 2)}."
        )
    return patched


def weights_hash(model: Any) -> str:
    """The hash that identifies a patch's base model, from a MODEL's own weights, without its patches."""

    def own(path: str) -> Tensor:
        weight, convert, _ = stored_weight(model, f"{UNET}{path}.weight")
        return dequantised(weight, convert)

    found = surveyed(model)
    layers = [found.layer(key) for key in hashed_keys(found)]
    return hash_of_weights((layer.key, own(layer.path)) for layer in layers)


def surviving_share(model: Any, patch: Patch, strength: float = 1.0) -> tuple[float, str] | None:
    """Share of the edit that survives when the host rounds it into the weights, and the dtype of the weights.

    The share is ``⟨Δ', Δ⟩ / ‖Δ‖²``, with the host's own rounding, on top of the patches that the MODEL carries.

    Returns:
        ``None`` if the edit is zero, or the host stores the weights in a quantized format of its own, into which this
        path rounds nothing.
    """
    found = surveyed(model)
    seed = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed
    surviving = total = 0.0
    dtypes: dict[torch.dtype, None] = {}
    for canonical, factor in patch.factors.items():
        layer = found.layer(canonical)
        key = f"{UNET}{layer.path}.weight"
        weight, _, _ = stored_weight(model, key)
        if type(weight) not in ORDINARY:
            return None
        with torch.no_grad():
            own = effective_weight(model, key)
            delta = strength * factor.to(own.device, torch.float32).delta()
            before = comfy.float.stochastic_rounding(own, weight.dtype, seed=seed(key)).float()
            after = comfy.float.stochastic_rounding(own + delta, weight.dtype, seed=seed(key)).float()
            surviving += float(((after - before) * delta).sum(dtype=torch.float64))
            total += float(delta.square().sum(dtype=torch.float64))
        dtypes[weight.dtype] = None
    if total == 0:
        return None
    return surviving / total, " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
