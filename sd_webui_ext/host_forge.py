"""Adapter to Forge: its loaded model as the core's, and patches in its weights.

Forge merges patches into weights when it loads a model, starting from originals that it keeps itself, and derives the
patched model of each picture from ``forge_objects_original``. A patch added there is below every ``<lora:…>``.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from backend import memory_management
from backend.patcher.lora import load_lora, merge_lora_to_weight
from modules import call_queue, sd_models, shared
from torch import Tensor, nn

from ..core.errors import ModelError, PatchError
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
from .prompts import WebText
from .webui import V_REMEDY, WebUI, surveyed, usual_size_and_guidance

__all__ = ["Forge"]

_UNET = "diffusion_model."


@dataclass
class _Resident:
    """A loaded checkpoint; Forge creates a new object for each.

    Attributes:
        own: Its UNet patcher without any patch.
        now: Its UNet patcher with ``patches``.
        written: The weights that applying ``patches`` produced, by canonical key.
    """

    key: int
    survey: ModelSurvey
    own: Any
    now: Any
    patches: dict[str, tuple[Patch, float]] = field(default_factory=dict)
    written: dict[str, Tensor] = field(default_factory=dict)
    unpatched: bool = False  # during a job the patches are out of the weights; no picture is generated then

    def path(self, key: str) -> str:
        return f"{_UNET}{self.survey.layer(key).path}.weight"


class Forge(WebUI):
    """lllyasviel's stable-diffusion-webui-forge, 2.0."""

    name = "Forge"

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count(1)
        self._residents: weakref.WeakKeyDictionary[Any, _Resident] = weakref.WeakKeyDictionary()

    # -- the model -----------------------------------------------------------------------------------------------

    def _loaded(self) -> Any:
        try:
            with torch.inference_mode():
                model, _ = sd_models.forge_model_reload()
        except (KeyError, ValueError) as error:
            raise ModelError(f"No checkpoint is loaded: choose one at the top of the page. ({error})") from None
        return model

    def _resident(self, model: Any) -> _Resident:
        if (known := self._residents.get(model)) is None:
            own = model.forge_objects_original.unet
            if not hasattr(own, "lora_loader"):
                raise ModelError(
                    "This version of Forge applies patches in an unsupported way: make the patch in ComfyUI or with "
                    "the command line, and use it here as a LoRA, with <lora:name:1>."
                )
            made = _Resident(next(self._numbers), surveyed(own.model.diffusion_model), own, own)
            known = self._residents.setdefault(model, made)  # another thread may have been first
        return known

    def model(self) -> LoadedModel:
        data = sd_models.model_data
        model = data.sd_model
        if _other_is_selected() or getattr(model, "forge_objects", None) is None:
            with self.alone():
                model = self._loaded()
        resident = self._resident(model)
        return LoadedModel(model.sd_checkpoint_info.title, resident.survey.family, resident.key)

    def checkpoint(self) -> str:
        info = sd_models.model_data.forge_loading_parameters.get("checkpoint_info")
        return "" if info is None else str(info.name)

    # -- patches in its weights ----------------------------------------------------------------------------------

    def apply(self, name: str, patch: Patch, strength: float) -> None:
        with self.alone():
            model = self._loaded()
            resident = self._resident(model)
            _check_dtype(resident)
            patch.check_fits(resident.survey)
            patch.scaled(strength)
            before, known = resident.written, resident.patches
            wanted = {key: value for key, value in known.items() if key != name}
            self._write(model, resident, {**wanted, name: (patch, strength)})
            own = resident.own.lora_loader.backup
            unchanged = all(
                torch.equal(resident.written[key], before.get(key, own[resident.path(key)].cpu()))
                for key in patch.factors
            )
            if unchanged and strength != 0 and name not in known:
                self._write(model, resident, known)
                raise PatchError(
                    f"The patch '{name}' changes nothing here: at strength {strength:g} all of it is lost in the "
                    "rounding of this model's weights. Use a higher strength."
                )

    def remove(self, name: str) -> None:
        with self.alone():
            model = self._loaded()
            resident = self._resident(model)
            if name not in resident.patches:
                raise PatchError(f"No patch '{name}' was applied to the loaded model.")
            self._write(model, resident, {key: value for key, value in resident.patches.items() if key != name})

    def _write(self, model: Any, resident: _Resident, wanted: dict[str, tuple[Patch, float]]) -> None:
        made = resident.own.clone() if wanted else resident.own
        for name, (patch, strength) in wanted.items():
            entries = _entries(resident, patch)
            # Forge identifies merged patches by this name: use a new one for each content
            title = f"forget-concept/{name}/{next(self._numbers)}"
            taken = set(made.add_patches(filename=title, patches=entries, strength_patch=strength))
            if lost := {resident.path(key) for key in patch.factors} - taken:
                raise PatchError(
                    f"The patch '{name}' does not fit the loaded model, which has no weight {sorted(lost)[0]}: make it "
                    "again on this model."
                )
        try:
            _merge_patches(made)
        except BaseException:  # some weights have changed, but Forge would take all of them for the old ones
            now = resident.now
            now.lora_loader.refresh(now.lora_patches, offload_device=now.offload_device, force_refresh=True)
            raise
        keys = dict.fromkeys(key for patch, _ in wanted.values() for key in patch.factors)
        resident.written = {key: _weight(resident, key).detach().to("cpu", copy=True) for key in keys}
        resident.patches, resident.now = wanted, made
        # this drops the last picture's <lora:…>; the next picture applies its own on top of the patches
        model.forge_objects_original.unet = made
        model.forge_objects_after_applying_lora = model.forge_objects_original.shallow_copy()
        model.forge_objects = model.forge_objects_original.shallow_copy()
        model.current_lora_hash = str([])

    def active(self) -> list[ActivePatch]:
        model = sd_models.model_data.sd_model
        resident = None if getattr(model, "forge_objects", None) is None else self._residents.get(model)
        if resident is None or not resident.patches or _other_is_selected():
            return []
        in_force = resident.unpatched or model.forge_objects_original.unet is resident.now
        # while it generates a picture, Forge moves weights; the picture uses the patcher checked above, which suffices
        if in_force and call_queue.queue_lock.acquire(blocking=False):
            try:
                in_force = resident.unpatched or _weights_match(model, resident)
            finally:
                call_queue.queue_lock.release()
        return [ActivePatch(name, strength, in_force) for name, (_, strength) in resident.patches.items()]

    # -- the model under gradients ---------------------------------------------------------------------------------

    @contextmanager
    def latent_diffusion(self) -> Iterator[HostLatentDiffusion]:
        self.check_job()
        model = self._loaded()
        resident = self._resident(model)
        _check_dtype(resident)
        with ExitStack() as stack:
            stack.enter_context(_without_patches(model, resident))
            unet = resident.own.model.diffusion_model
            stack.enter_context(detached_view(unet))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(without_checkpointing(unet))
            stack.enter_context(_norm_inputs_copied(unet))
            yield _diffusion(model, resident)


def _other_is_selected() -> bool:
    """Whether the loaded model is not the selected one: Forge loads that only when it is needed."""
    data = sd_models.model_data
    return bool(data.forge_hash != str(data.forge_loading_parameters))


def _check_dtype(resident: _Resident) -> None:
    if (dtype := coarse_dtype(resident.survey)) is not None:
        raise ModelError(
            f"The model's weights are stored in {dtype}, which is too coarse to work on: set 'Diffusion in Low Bits' "
            "at the top of the page to 'Automatic (fp16 LoRA)'."
        )


def _entries(resident: _Resident, patch: Patch) -> dict[str, Any]:
    """The patch in the form that this Forge's LoRA loader returns, which differs between forks."""
    paths = {key.replace(".", "_"): resident.path(key) for key in patch.factors}
    state = {}
    for key, factor in patch.factors.items():
        state[key.replace(".", "_") + ".lora_up.weight"] = factor.up
        state[key.replace(".", "_") + ".lora_down.weight"] = factor.down
    return dict(load_lora(state, paths)[0])


def _weight(resident: _Resident, key: str) -> Tensor:
    return resident.survey.linear(key).weight


def _merge_patches(patcher: Any) -> None:
    """Merge the patches of ``patcher`` into the weights now, and unload all other clones of the model."""
    memory_management.unload_model_clones(patcher)
    patcher.refresh_loras()


def _lora_hash(patcher: Any) -> str:
    """The hash that Forge's LoRA loader has after merging the patches of this patcher."""
    return str(list(patcher.lora_patches.keys()))


def _weights_match(model: Any, resident: _Resident) -> bool:
    """Whether the weights are the written ones or, with LoRAs on top, the originals with patches and LoRAs merged."""
    loader = resident.own.lora_loader
    if loader.loaded_hash == _lora_hash(resident.now):
        return all(
            torch.equal(_weight(resident, key).detach().cpu(), written) for key, written in resident.written.items()
        )
    known = (model.forge_objects.unet, model.forge_objects_after_applying_lora.unet)
    above = next((patcher for patcher in known if _lora_hash(patcher) == loader.loaded_hash), None)
    if above is None or any(title not in above.lora_patches for title in resident.now.lora_patches):
        return False
    difference = changed = 0.0
    for key in resident.written:
        path, weight = resident.path(key), _weight(resident, key).detach()
        own = loader.backup[path].to(weight.device)
        parts = {title: patches.get(path, []) for title, patches in above.lora_patches.items()}
        merged, without = (
            merge_lora_to_weight([part for title in titles for part in parts[title]], own, path).float()
            for titles in (parts, [title for title in parts if title not in resident.now.lora_patches])
        )
        difference += float((weight.float() - merged).square().sum())
        changed += float((merged - without).square().sum())
    # weights merged on another device differ in the last bits
    return difference <= 1e-4 * changed


@contextmanager
def _without_patches(model: Any, resident: _Resident) -> Iterator[None]:
    """Load UNet, text encoder and VAE without any patch; restore the previous patches afterwards."""
    clip, vae = model.forge_objects_original.clip, model.forge_objects_original.vae
    loader = resident.own.lora_loader
    known = (model.forge_objects.unet, model.forge_objects_after_applying_lora.unet, resident.now)
    before = next((patcher for patcher in known if _lora_hash(patcher) == loader.loaded_hash), resident.now)
    texts = (model.forge_objects.clip, model.forge_objects_after_applying_lora.clip)
    text = next((own for own in texts if _lora_hash(own.patcher) == own.patcher.lora_loader.loaded_hash), clip)
    try:
        resident.unpatched = True
        with torch.inference_mode():
            _merge_patches(resident.own)
            _merge_patches(clip.patcher)
            room = resident.own.memory_required([8, vae.latent_channels, 128, 128])
            memory_management.load_models_gpu([resident.own, clip.patcher, vae.patcher], memory_required=room)
        device = resident.own.load_device
        if any(weight.device != device for weight in resident.own.model.diffusion_model.parameters()):
            raise ModelError(
                "There is too little GPU memory for the whole UNet: raise 'GPU Weights' at the top of the page, or "
                "close other programs that use the GPU."
            )
        yield
    finally:
        with torch.inference_mode():
            _merge_patches(before)
            _merge_patches(text.patcher)
        resident.unpatched = False


@contextmanager
def _norm_inputs_copied(unet: nn.Module) -> Iterator[None]:
    """Copy the inputs of layer norms: Forge changes them in place afterwards, which breaks the norms' backward pass."""
    norms = [part for part in unet.modules() if isinstance(part, nn.LayerNorm)]
    hooks = [norm.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:])) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# -- as the core sees it ------------------------------------------------------------------------------------------


def _diffusion(model: Any, resident: _Resident) -> HostLatentDiffusion:
    inner = resident.own.model
    unet, predictor = inner.diffusion_model, inner.predictor
    prediction = str(getattr(predictor, "prediction_type", ""))
    if prediction not in ("epsilon", "v_prediction") or not hasattr(predictor, "sigmas"):
        raise ModelError(
            f"The sampling of this model ({type(predictor).__name__}, {prediction}) is not supported: only discrete "
            "epsilon- and v-prediction models are."
        )
    check_prediction(Path(model.sd_checkpoint_info.filename), prediction, V_REMEDY)
    pooled = bool(model.is_sdxl)

    def predict(x: Tensor, timesteps: Tensor, states: TextStates) -> Tensor:
        check_channels(x, unet)
        vector = None
        if states.pooled is not None:
            sizes = _sizes(model, x.shape[-2] * 8, x.shape[-1] * 8).to(states.pooled)
            vector = torch.cat([states.pooled, sizes.expand(len(states), -1)], 1)
        return unet(x, timesteps.float(), context=states.hidden, y=vector, transformer_options={})

    model_hash = hash_of_unet(resident.survey)
    side, guidance = usual_size_and_guidance(resident.survey, model_hash, prediction)
    return HostLatentDiffusion(
        unet,
        _text(model, resident.survey, pooled),
        (1 / (predictor.sigmas.detach().float().cpu() ** 2 + 1)).clone(),
        prediction,
        device=resident.own.load_device,
        dtype=inner.computation_dtype,
        vae=_Autoencoder(model.forge_objects_original.vae),
        latent_shape=(int(model.forge_objects_original.vae.latent_channels), side, side),
        guidance=guidance,
        name=model.sd_checkpoint_info.name_for_extra,
        eps_model=predict,
        model_hash=model_hash,
    )


def _sizes(model: Any, height: int, width: int) -> Tensor:
    """SDXL's size conditioning, as Forge computes it for a picture of this size in pixels."""
    crop = (shared.opts.sdxl_crop_top, shared.opts.sdxl_crop_left)
    parts = [model.embedder(torch.tensor([float(value)])) for value in (height, width, *crop, height, width)]
    return torch.cat(parts).flatten()[None]


def _text(model: Any, found: ModelSurvey, pooled: bool) -> WebText:
    engine = getattr(model, "text_processing_engine_l" if pooled else "text_processing_engine", None)
    second: Any = getattr(model, "text_processing_engine_g", None)
    if engine is None or (pooled and second is None):
        raise ModelError(
            f"This model's text encoder ({type(model).__name__}) is not supported: load a Stable Diffusion 1, 2 or XL "
            "checkpoint."
        )
    skip = int(shared.opts.CLIP_stop_at_last_layers)
    model.set_clip_skip(skip)
    if pooled:
        layer = "sdxl:penultimate,no_final_norm" if skip <= 2 else f"sdxl:layer=-{skip}"
    else:
        layer = "clip_skip=1,final_norm" if model.is_sd2 else f"clip_skip={skip},final_norm"

    def encode(prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        with torch.inference_mode():
            states = engine(prompts)
            if second is None:
                return states, None
            others, vector = second(prompts)
            return torch.cat([states, others], 2), vector

    engines = [one for one in (engine, second) if one is not None]
    embeddings, modules = [one.embeddings for one in engines], [one.text_encoder for one in engines]
    text = WebText(engine, embeddings, encode, modules, layer, shared.opts.emphasis == "None")
    text.check_fits(found)
    return text


class _Autoencoder:
    """The loaded VAE as the core's autoencoder, with latents at the UNet's scale; encodes to the posterior's mean."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def modules(self) -> list[nn.Module]:
        """The modules whose weights are used."""
        return [self._vae.first_stage_model]

    def encode(self, images: Tensor) -> Tensor:
        found, first = [], self._vae.first_stage_model
        with torch.inference_mode():
            for image in images.split(1):
                pixels = image.to(self._vae.device, self._vae.vae_dtype)
                found.append(first.process_in(first.encode(pixels, lambda posterior: posterior.mode()).float()))
        return torch.cat(found).clone()

    def decode(self, latents: Tensor) -> Tensor:
        found, first = [], self._vae.first_stage_model
        with torch.inference_mode():
            for latent in latents.split(1):
                samples = first.process_out(latent.float()).to(self._vae.device, self._vae.vae_dtype)
                found.append(first.decode(samples).float().clamp(-1, 1))
        return torch.cat(found).clone()
