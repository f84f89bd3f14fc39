"""Adapter to AUTOMATIC1111's webui: its loaded model as the core's, and patches in its weights.

The built-in Lora extension merges ``<lora:…>`` into a layer's weights when the layer next runs, starting from a backup
that it made the first time. Code that changes weights must therefore discard that backup, or the next picture undoes
the change.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from modules import devices, lowvram, sd_hijack, sd_models, sd_samplers_common, sd_unet, shared
from modules.prompt_parser import SdConditioning
from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.models.host_weights import (
    HostLatentDiffusion,
    check_channels,
    coarse_dtype,
    detached_view,
    without_checkpointing,
)
from ..core.models.latent_diffusion import hash_of_unet
from ..core.models.model_survey import ModelSurvey
from ..core.models.prediction_marks import check_prediction
from ..core.models.text_states import TextStates
from ..core.patch.patch import Patch
from ..core.service.host_interface import ActivePatch, LoadedModel
from ..core.service.live_weights import LiveWeights
from .prompts import WebText
from .webui import V_REMEDY, WebUI, lora_extension, surveyed, usual_size_and_guidance

__all__ = ["A1111"]

_SIZES = 3 * 2 * 256  # SDXL's size conditions: three pairs of 256 sines and cosines


@dataclass(frozen=True)
class _Resident:
    """A model object with the checkpoint that it currently holds."""

    key: int
    survey: ModelSurvey
    live: LiveWeights


class A1111(WebUI):
    """AUTOMATIC1111's stable-diffusion-webui, 1.10."""

    name = "AUTOMATIC1111"

    def __init__(self) -> None:
        super().__init__()
        self._keys = itertools.count(1)
        self._residents: weakref.WeakKeyDictionary[nn.Module, _Resident] = weakref.WeakKeyDictionary()

    # -- the model -----------------------------------------------------------------------------------------------

    def _loaded(self) -> Any:
        model = shared.sd_model  # loads the selected checkpoint if none is loaded yet
        if model is None:
            raise ModelError("No checkpoint is loaded: choose one at the top of the page.")
        return model

    def _resident(self, model: Any) -> _Resident:
        if (known := self._residents.get(model)) is None:
            unet = getattr(getattr(model, "model", None), "diffusion_model", None)
            if not isinstance(unet, nn.Module):
                raise ModelError(
                    f"The loaded model ({type(model).__name__}) has no supported diffusion model: load a Stable "
                    "Diffusion 1, 2 or XL checkpoint."
                )
            found = surveyed(unet)
            made = _Resident(next(self._keys), found, LiveWeights(found, _restore_original, _original_weight))
            known = self._residents.setdefault(model, made)  # another thread may have been first
        return known

    def model_loaded(self, model: Any) -> None:
        # the webui loads another checkpoint into the same object
        self._residents.pop(model, None)

    def model(self) -> LoadedModel:
        model = self._loaded()
        resident = self._resident(model)
        return LoadedModel(model.sd_checkpoint_info.title, resident.survey.family, resident.key)

    def checkpoint(self) -> str:
        info = getattr(sd_models.model_data.sd_model, "sd_checkpoint_info", None)
        return "" if info is None else str(info.name)

    # -- patches in its weights ----------------------------------------------------------------------------------

    def apply(self, name: str, patch: Patch, strength: float) -> None:
        with self.alone():
            resident = self._resident(self._loaded())
            _check_dtype(resident.survey)
            resident.live.apply(name, patch, strength)

    def remove(self, name: str) -> None:
        with self.alone():
            self._resident(self._loaded()).live.remove(name)

    def active(self) -> list[ActivePatch]:
        model = sd_models.model_data.sd_model
        resident = None if model is None else self._residents.get(model)
        if resident is None or not resident.live.patches:
            return []
        in_force = resident.live.state() == "in force"
        return [ActivePatch(name, strength, in_force) for name, (_, strength) in resident.live.patches.items()]

    # -- the model under gradients ---------------------------------------------------------------------------------

    @contextmanager
    def latent_diffusion(self) -> Iterator[HostLatentDiffusion]:
        self.check_job()
        model = self._loaded()
        resident = self._resident(model)
        if shared.cmd_opts.lowvram:
            raise ModelError(
                "The webui was started with --lowvram, which splits the model between devices: start it with --medvram "
                "or without either option to make a model forget."
            )
        _check_dtype(resident.survey)
        with ExitStack() as stack:
            stack.enter_context(_torch_unet())
            stack.enter_context(_without_tiling())
            stack.enter_context(_without_hypernetworks())
            stack.enter_context(_without_loras(model))
            stack.enter_context(resident.live.aside())
            stack.enter_context(_on_device(model))
            stack.enter_context(detached_view(model.model.diffusion_model))
            stack.enter_context(without_checkpointing(model.model.diffusion_model))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            yield _diffusion(model, resident.survey)


def _check_dtype(found: ModelSurvey) -> None:
    if (dtype := coarse_dtype(found)) is not None:
        raise ModelError(
            f"The model's weights are stored in {dtype}, which is too coarse to work on: set 'FP8 weight' to 'Disable' "
            "in Settings > Optimizations, and reload the checkpoint."
        )


# -- the built-in Lora extension ----------------------------------------------------------------------------------


def _restore_original(module: nn.Module) -> None:
    """Restore a layer's weights without any ``<lora:…>``, and drop the backup that the next one would start from."""
    networks = lora_extension()
    if networks is None or not hasattr(module, "network_current_names"):
        return
    with torch.no_grad():
        networks.network_restore_weights_from_backup(module)
    networks.network_reset_cached_weight(module)


def _original_weight(module: nn.Module) -> Tensor:
    backup = getattr(module, "network_weights_backup", None)
    # while a picture is generated, the layer may be in the middle of a change
    busy = bool(getattr(module, "network_current_names", ())) or bool(shared.state.job)
    return backup if busy and isinstance(backup, Tensor) else module.weight  # type: ignore[return-value]


@contextmanager
def _without_loras(model: nn.Module) -> Iterator[None]:
    """Take the last picture's ``<lora:…>`` out of the weights, and merge them again afterwards."""
    networks = lora_extension()
    if networks is None:
        yield
        return
    loaded = list(networks.loaded_networks)
    left = [(module, module.network_current_names) for module in model.modules() if _has_loras(module)]
    wanted = tuple((x.name, x.te_multiplier, x.unet_multiplier, x.dyn_dim) for x in loaded)
    try:
        networks.loaded_networks[:] = []
        _apply_loras(module for module, _ in left)
        yield
    finally:
        networks.loaded_networks[:] = loaded
        # layers with outdated LoRAs are updated by the next picture
        _apply_loras(module for module, names in left if names == wanted)


@torch.no_grad()
def _apply_loras(modules: Iterable[nn.Module]) -> None:
    networks = lora_extension()
    for module in modules:
        networks.network_apply_weights(module)


def _has_loras(module: nn.Module) -> bool:
    return bool(getattr(module, "network_current_names", ()))


# -- what else the webui does to a model --------------------------------------------------------------------------


@contextmanager
def _torch_unet() -> Iterator[None]:
    """Use the checkpoint's own UNet where an extension has replaced it (TensorRT)."""
    option = sd_unet.current_unet_option
    if option is None:
        yield
        return
    sd_unet.apply_unet("None")
    try:
        yield
    finally:
        sd_unet.apply_unet(option.label)


@contextmanager
def _without_tiling() -> Iterator[None]:
    hijack = sd_hijack.model_hijack
    circular = hijack.circular_enabled
    hijack.apply_circular(False)
    try:
        yield
    finally:
        hijack.apply_circular(circular)


@contextmanager
def _without_hypernetworks() -> Iterator[None]:
    loaded = shared.loaded_hypernetworks
    shared.loaded_hypernetworks = []
    try:
        yield
    finally:
        shared.loaded_hypernetworks = loaded


@contextmanager
def _on_device(model: Any) -> Iterator[None]:
    """With ``--medvram``, keep the UNet on the device while other parts are moved there too."""
    if not lowvram.is_enabled(model):
        yield
        return
    lowvram.send_everything_to_cpu()
    model.model.to(devices.device)
    try:
        yield
    finally:
        lowvram.send_everything_to_cpu()
        model.model.to(devices.cpu)


def _keep_unet(model: Any) -> None:
    if lowvram.is_enabled(model):
        # before it moves the next part in, the webui moves out the part that it has on record
        if lowvram.module_in_gpu is model.model:
            lowvram.module_in_gpu = None
        else:
            lowvram.send_everything_to_cpu()


# -- as the core sees it ------------------------------------------------------------------------------------------


def _diffusion(model: Any, found: ModelSurvey) -> HostLatentDiffusion:
    unet = model.model.diffusion_model
    parameterization = getattr(model, "parameterization", "eps")
    if parameterization not in ("eps", "v"):
        raise ModelError(
            f"This model's prediction type '{parameterization}' is not supported: only epsilon- and v-prediction "
            "models are."
        )
    prediction = "epsilon" if parameterization == "eps" else "v_prediction"
    check_prediction(Path(model.sd_checkpoint_info.filename), prediction, V_REMEDY)
    sizes: dict[tuple[int, int], Tensor] = {}

    def size_conditions(height: int, width: int) -> Tensor:
        if (height, width) not in sizes:
            with torch.no_grad(), devices.autocast():
                _keep_unet(model)
                known = model.get_learned_conditioning(SdConditioning([""], width=width, height=height))
            sizes[height, width] = known["vector"][:, -_SIZES:].clone()
        return sizes[height, width]

    def predict(x: Tensor, timesteps: Tensor, states: TextStates) -> Tensor:
        check_channels(x, unet)
        if states.pooled is None:
            return model.apply_model(x, timesteps, {"c_crossattn": [states.hidden]})
        vector = size_conditions(x.shape[-2] * 8, x.shape[-1] * 8).to(states.pooled)
        vector = torch.cat([states.pooled, vector.expand(len(states), -1)], 1)
        return model.apply_model(x, timesteps, {"crossattn": states.hidden, "vector": vector})

    model_hash = hash_of_unet(found)
    side, guidance = usual_size_and_guidance(found, model_hash, prediction)
    return HostLatentDiffusion(
        unet,
        _text(model, found),
        # while it generates a picture, the webui may replace it by a rescaled or half-precision schedule
        getattr(model, "alphas_cumprod_original", model.alphas_cumprod),
        prediction,
        device=devices.device,
        dtype=devices.dtype_unet,
        vae=_Autoencoder(model),
        latent_shape=(int(model.latent_channels), side, side),
        guidance=guidance,
        name=model.sd_checkpoint_info.name_for_extra,
        eps_model=predict,
        model_hash=model_hash,
    )


def _text(model: Any, found: ModelSurvey) -> WebText:
    conditioner = model.cond_stage_model
    engine = conditioner
    if not hasattr(engine, "tokenize_line"):
        engine = next((part for part in getattr(conditioner, "embedders", ()) if hasattr(part, "tokenize_line")), None)
    if engine is None or engine.id_end is None:
        raise ModelError(
            f"This model's text encoder ({type(conditioner).__name__}) is not supported: load a Stable Diffusion 1, 2 "
            "or XL checkpoint."
        )
    skip = int(shared.opts.CLIP_stop_at_last_layers)
    if getattr(model, "is_sdxl", False):
        layer = f"sdxl:layer=-{skip}" if shared.opts.sdxl_clip_l_skip is True else "sdxl:penultimate,no_final_norm"
    elif getattr(model, "is_sd2", False):
        layer = "clip_skip=1,final_norm"
    else:
        layer = f"clip_skip={skip},final_norm"

    def encode(prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad(), devices.autocast():
            _keep_unet(model)
            states = model.get_learned_conditioning(SdConditioning(prompts))
        if not isinstance(states, dict):
            return states, None
        return states["crossattn"], states["vector"][:, :-_SIZES]

    plain = shared.opts.emphasis == "None"
    text = WebText(engine, [engine.hijack.embedding_db], encode, [conditioner], layer, plain)
    text.check_fits(found)
    return text


class _Autoencoder:
    """The loaded VAE as the core's autoencoder, with latents at the UNet's scale; encodes to the posterior's mean."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def modules(self) -> list[nn.Module]:
        """The modules whose weights are used."""
        return [self._model.first_stage_model]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        first = self._model.first_stage_model
        found = []
        for image in images.split(1):
            _keep_unet(self._model)
            pixels = image.to(devices.device, devices.dtype_vae)
            with devices.without_autocast():
                if self._model.is_sdxl:
                    first.to(devices.device)
                    # the class in use samples from the posterior; its parent returns the posterior
                    parent: Any = super(type(first), first)
                    posterior = parent.encode(pixels)
                else:
                    posterior = first.encode(pixels)
            if not hasattr(posterior, "mode"):
                raise ModelError(
                    "The loaded VAE is not one of a Stable Diffusion model and cannot encode pictures: select "
                    "'Automatic' under Settings > VAE."
                )
            found.append(posterior.mode().float() * self._model.scale_factor)
        return torch.cat(found)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        found = []
        for latent in latents.split(1):
            _keep_unet(self._model)
            pixels = sd_samplers_common.samples_to_images_tensor(latent.to(devices.device), 0, self._model)
            devices.test_for_nans(pixels, "vae")
            found.append(pixels.float())
        return torch.cat(found)
