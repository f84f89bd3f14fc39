"""Everything this pack asks of ComfyUI: the only file that names ``comfy``.

ComfyUI runs every node under ``torch.inference_mode()`` and keeps one loaded copy of a model's weights for all of its
MODELs. :func:`borrowed` lends that copy out as a :class:`LatentDiffusion` that gradients may flow through, without
copying it, and gives it back as it was.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.clip_model
import comfy.float
import comfy.latent_formats
import comfy.ldm.models.autoencoder
import comfy.lora
import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from server import PromptServer
from torch import Tensor, nn

from ..core.diffusion import LatentDiffusion, hash_of_weights
from ..core.errors import ModelError, PatchError, listed
from ..core.lending import LentDiffusion, laundered
from ..core.mini import ldm
from ..core.mini.config import GUIDANCE, LATENT_COLOURS, LATENT_COLOURS_BIAS
from ..core.mini.files import weights_folder
from ..core.patch import Patch
from ..core.progress import Progress, ProgressEvent
from ..core.story import Story
from ..core.text import CLIPText, TextEncoder, TextStates
from ..core.unet import PROJECTIONS, UNetSurvey, survey

__all__ = [
    "Fading",
    "HostText",
    "borrowed",
    "embedded_model",
    "is_embedded",
    "lora_file",
    "lora_files",
    "lora_folder",
    "lora_stamp",
    "opened_text",
    "output_folder",
    "patched_weights",
    "progress",
    "show_text",
    "surveyed",
    "surviving_share",
    "weights_hash",
    "with_lora",
    "work_folder",
    "workflow",
]

_PLAIN = (torch.float32, torch.float16, torch.bfloat16)
_UNET = "diffusion_model."
# of two text encoders that are the same one, in half precision or not
_SAME_STATES = 0.02


# -- what the person sees -----------------------------------------------------------------------------------------


def show_text(node_id: str | None, text: str) -> None:
    """Show ``text`` on the node, in the page that queued it."""
    instance: Any = getattr(PromptServer, "instance", None)
    if node_id is not None and hasattr(instance, "send_progress_text"):
        instance.send_progress_text(text, node_id)


def progress(node_id: str | None, fading: Fading | None = None) -> Progress:
    """A core progress callback: bar, picture and text on the node; it raises the host's own exception once Cancel is
    pressed."""
    bar = comfy.utils.ProgressBar(1)
    story = Story()
    shown = 0.0

    def told(event: ProgressEvent) -> None:
        nonlocal shown
        management.throw_exception_if_processing_interrupted()
        line = story.line(event)
        picture = fading.picture() if fading is not None and fading.due(event) else None
        bar.update_absolute(event.step, max(event.total, 1), picture)
        now = time.monotonic()
        if now - shown >= 0.2 or event.step >= event.total:
            shown = now
            show_text(node_id, line)

    return told


class Fading:
    """The concept as the model shows it now, drawn in a few steps while it is trained: a preview for :func:`progress`.

    What is trained is on while a training reports its steps, so that a picture drawn there shows it. It has noise of
    its own: the training goes on as if there had been none.
    """

    _STEPS = 8
    _SIDE = 256

    def __init__(self, diffusion: LatentDiffusion, model: Any, prompt: str, seed: int, every: int) -> None:
        """``every``: training steps from one picture to the next, 0 for none."""
        self._diffusion, self._format = diffusion, model.model.latent_format
        self._prompt, self._seed, self._every = prompt, seed, every

    def due(self, event: ProgressEvent) -> bool:
        """Whether this step wants a picture: only trainings have a loss."""
        return self._every > 0 and event.loss is not None and (event.step == 1 or event.step % self._every == 0)

    def picture(self) -> tuple[str, Any, int] | None:
        """The picture as the host takes it, or ``None`` where these latents have no colours known."""
        from PIL import Image

        def stop(event: ProgressEvent) -> None:
            management.throw_exception_if_processing_interrupted()

        model = self._diffusion
        latents = model.sample(
            [self._prompt], [self._seed], self._STEPS, model.guidance, progress=stop, sampler="dpm++"
        )
        if model.vae is not None:
            pixels = model.decode(latents)[0].movedim(0, -1)
        else:
            factors = getattr(self._format, "latent_rgb_factors", None)
            if factors is None:
                return None
            bias = getattr(self._format, "latent_rgb_factors_bias", None)
            colours = torch.tensor(factors, dtype=torch.float32)
            pixels = latents[0].float().cpu().movedim(0, -1) @ colours
            if bias is not None:
                pixels = pixels + torch.tensor(bias, dtype=torch.float32)
        whole = ((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return "JPEG", Image.fromarray(whole.contiguous().numpy()), self._SIDE


def workflow(hidden: Any) -> dict[str, str]:
    """The graph that is running, as pictures carry it (``prompt``, ``workflow``); empty where the host is told not to
    write such things."""
    if comfy.cli_args.args.disable_metadata:
        return {}
    found = {"prompt": hidden.prompt} if hidden.prompt else {}
    found |= hidden.extra_pnginfo or {}
    return {str(name): json.dumps(value) for name, value in found.items()}


# -- files --------------------------------------------------------------------------------------------------------


def lora_files() -> list[str]:
    """What there is in the host's LoRA folders, as the stock loaders list it."""
    return [name for name in folder_paths.get_filename_list("loras") if name.lower().endswith(".safetensors")]


def lora_file(name: str) -> Path:
    """Where a file of that list is. Raises :class:`PatchError` for one that is not in it."""
    found = folder_paths.get_full_path("loras", name) if name in lora_files() else None
    if found is None:
        raise PatchError(f"There is no file '{name}' in the LoRA folders: press R to read them again, and choose one.")
    return Path(found)


def lora_stamp(name: str | None) -> str:
    """What changes when a file of that list does."""
    try:
        found = lora_file(name or "").stat()
    except (OSError, PatchError):
        return "absent"
    return f"{found.st_mtime_ns} {found.st_size}"


def lora_folder() -> Path:
    """Where new LoRAs go."""
    return Path(folder_paths.get_folder_paths("loras")[0])


def output_folder() -> Path:
    """Where the host's own nodes write what they make."""
    return Path(folder_paths.get_output_directory())


def work_folder() -> Path:
    """For what takes long and may be wanted again; the page cannot reach it."""
    return Path(folder_paths.get_user_directory()) / "__forget_concept"


# -- text ---------------------------------------------------------------------------------------------------------


def _literal(text: str) -> str:
    """``text`` without the prompt syntax: parentheses are emphasis in a prompt, and words in a concept."""
    return re.sub(r"(?<!\\)([()])", r"\\\1", text)


class HostText:
    """A CLIP as the core's text encoder: the host's own tokens and its own encode path (layer, norm, patches, hooks).

    Only the first section of 77 tokens is used; the CLIP must have been loaded already.
    """

    max_length = 77
    _AT_ONCE = 32

    def __init__(self, clip: Any, family: str, pooled: bool) -> None:
        """``pooled``: whether the model takes a pooled vector too."""
        self._clip = clip.clone()
        self._pooled = pooled
        # loading again for every prompt could push out the UNet that is being worked on
        self._clip.load_model = lambda *args, **kwargs: self._clip.patcher
        self._family = family

    @property
    def layer(self) -> str:
        """Which states these are, in the core's words."""
        index = self._clip.layer_idx
        if self._family == "sdxl":
            return "sdxl:penultimate,no_final_norm" if index in (None, -2) else f"sdxl:layer={index}"
        if self._family == "sd2":
            return "clip_skip=1,final_norm" if index in (None, -2) else f"layer={index}"
        return f"clip_skip={1 if index is None else -index},final_norm"

    def _sections(self, text: str, words: bool = False) -> dict[str, list[list[tuple[Any, ...]]]]:
        tokens = self._clip.tokenize(_literal(text), return_word_ids=words)
        if not isinstance(tokens, dict) or not tokens:
            raise ModelError("This CLIP is no CLIP text encoder: connect the one that belongs to the MODEL.")
        return tokens

    def _first(self, tokens: Mapping[str, Any]) -> list[list[tuple[Any, ...]]]:
        return tokens["l"] if "l" in tokens else next(iter(tokens.values()))

    def _ids(self, tokens: Sequence[tuple[Any, ...]]) -> list[int]:
        if any(isinstance(token[0], Tensor) for token in tokens):
            raise ModelError("A textual inversion ('embedding:…') cannot stand in a concept: write it in words.")
        return [int(token[0]) for token in tokens]

    def token_ids(self, prompt: str) -> list[int]:
        return self._ids(self._first(self._sections(prompt))[0])

    def phrase_ids(self, phrase: str) -> list[int]:
        sections = self._first(self._sections(phrase, words=True))
        # word id 0 is start, end and padding
        return self._ids([token for section in sections for token in section if token[2] != 0])

    def encode(self, prompts: Sequence[str]) -> TextStates:
        # the host encodes all sections of one prompt at once, and gives only the first one's pooled vector
        size = 1 if self._pooled else self._AT_ONCE
        found = [self._encoded(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        return TextStates.cat(found)

    def _encoded(self, prompts: Sequence[str]) -> TextStates:
        management.throw_exception_if_processing_interrupted()
        sections: dict[str, list[list[tuple[Any, ...]]]] = {}
        for prompt in prompts:
            for name, own in self._sections(prompt).items():
                sections.setdefault(name, []).append(own[0])
        with torch.inference_mode():
            states, vector = self._clip.encode_from_tokens(sections, return_pooled=True)
        # a clone made outside of inference mode is an ordinary tensor
        hidden = states.clone().unflatten(1, (len(prompts), -1)).flatten(0, 1)
        return TextStates(hidden, vector.clone() if self._pooled and vector is not None else None)


def opened_text(clip: Any, own: TextEncoder, device: torch.device) -> CLIPText | None:
    """The CLIP once more, as one that gradients flow through and vectors can stand in: for inversions and attacks.

    The weights are copied as they are loaded, with the patches in them. ``None`` where the host's text encoder is not
    a single CLIP, or where the copy does not give the states of ``own``.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    name = getattr(clip.cond_stage_model, "clip", "")
    encoder: Any = getattr(clip.cond_stage_model, name, None)
    words: Any = getattr(getattr(clip.tokenizer, name, None), "tokenizer", None)
    if type(getattr(encoder, "transformer", None)) is not comfy.clip_model.CLIPTextModel or words is None:
        return None
    body = encoder.transformer.text_model
    layer = body.encoder.layers[0]
    table = body.embeddings.token_embedding.weight
    # some tables have rows that no word stands for
    rows = min(len(table), len(words))
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
        with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and overwritten
            copied = CLIPTextModel(config).float().eval().requires_grad_(False)
        state = {key: value.detach().float().cpu() for key, value in body.state_dict().items()}
        state["embeddings.token_embedding.weight"] = state["embeddings.token_embedding.weight"][:rows]
        found = copied.text_model.load_state_dict(state, strict=False)
        if found.missing_keys or found.unexpected_keys:
            return None
        index = clip.layer_idx if clip.layer_idx is not None else encoder.layer_idx
        opened = CLIPText(copied.to(device), words, 1 if index is None else -index)
        asked = ["", "a photo of a red star beside a house"]
        states, wanted = opened.encode(asked).hidden.float(), own.encode(asked).hidden.float().to(device)
        if states.shape != wanted.shape or float((states - wanted).norm() / wanted.norm()) > _SAME_STATES:
            return None
    return opened


class HostAutoencoder:
    """A VAE as the core's autoencoder, at the scale of the latents that the UNet works with.

    The VAE must have been loaded already: its own calls could push out the UNet that is being worked on.
    """

    def __init__(self, vae: Any, latent_format: Any) -> None:
        self._vae, self._format = vae, latent_format

    def encode(self, images: Tensor) -> Tensor:
        """Latents ``(n, c, h, w)`` of pictures ``(n, 3, H, W)`` in [-1, 1]; the posterior's mean."""
        found = []
        for image in images.float().split(1):
            management.throw_exception_if_processing_interrupted()
            with torch.inference_mode():
                pixels = self._vae.process_input((image + 1) / 2).to(self._vae.vae_dtype).to(self._vae.device)
                found.append(self._format.process_in(self._vae.first_stage_model.encode(pixels).float()))
            if found[-1].ndim != 4:
                raise ModelError("The VAE that came in is none of a picture model: connect the checkpoint's own.")
        return torch.cat(found).clone()

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures ``(n, 3, H, W)`` in [-1, 1] of latents ``(n, c, h, w)``."""
        found = []
        for latent in latents.float().split(1):
            management.throw_exception_if_processing_interrupted()
            with torch.inference_mode():
                samples = self._format.process_out(latent).to(self._vae.vae_dtype).to(self._vae.device)
                found.append(self._vae.process_output(self._vae.first_stage_model.decode(samples).float()) * 2 - 1)
        return torch.cat(found).clone()


# -- the model ----------------------------------------------------------------------------------------------------


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
            f"This model's sampling ({type(sampling).__name__}) is neither noise nor v prediction on discrete steps, "
            "as Stable Diffusion 1, 2 and XL have it: forgetting is not made for it."
        )
    return (1 / (sampling.sigmas.detach().float() ** 2 + 1)).clone(), prediction


def _latent_shape(patcher: Any, family: str, prediction: str) -> tuple[int, int, int]:
    if isinstance(patcher.model.model_config, _EmbeddedConfig):
        side = int(patcher.model.model_config.unet_config["image_size"])
    else:
        side = {"sdxl": 128, "sd2": 96 if prediction == "v_prediction" else 64}.get(family, 64)
    return (int(patcher.model.latent_format.latent_channels), side, side)


def surveyed(model: Any) -> UNetSurvey:
    """The cross-attention sites of a MODEL; nothing is loaded. Raises :class:`ModelError` where it has none."""
    if model is None:
        raise ModelError("The MODEL that came in is empty: the checkpoint has none.")
    unet = getattr(model.model, "diffusion_model", None)
    if not isinstance(unet, nn.Module):
        raise ModelError("The MODEL that came in has no diffusion model in it.")
    return survey(unet)


@contextmanager
def borrowed(model: Any, clip: Any, vae: Any = None) -> Iterator[LatentDiffusion]:
    """MODEL, CLIP and VAE, loaded, as the core's model, under gradients; given back bit-identical however the block
    ends.

    Every parameter of the UNet is for that time another, frozen ``Parameter`` on the same memory: the host's own are
    inference tensors, which autograd refuses. Weights are seen with the patches that MODEL carries. Raises
    :class:`ModelError`, in words, for a model without cross-attention and for a CLIP of another model; the host's
    interruption goes through untouched.
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
    if dtype not in _PLAIN:
        dtype = torch.float32
    text = HostText(clip, found.family, bool(base.adm_channels))

    def predict(x: Tensor, timesteps: Tensor, states: TextStates) -> Tensor:
        if x.shape[1] != unet.in_channels:
            raise ModelError(
                f"This UNet takes {unet.in_channels} channels (an inpainting or edit model): only a closed form (uce) "
                "can make it forget."
            )
        height, width = x.shape[-2] * 8, x.shape[-1] * 8
        vector = None
        if base.adm_channels:
            vector = base.encode_adm(pooled_output=states.pooled, width=width, height=height, device=x.device)
            vector = vector.to(x.device, x.dtype)
        return unet(x, timesteps.float(), context=states.hidden, y=vector, transformer_options={})

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(laundered(unet))
        stack.enter_context(_effective(patcher, unet, dtype))
        diffusion = LentDiffusion(
            unet,
            text,
            alphas,
            prediction,
            vae=None if vae is None else HostAutoencoder(vae, base.latent_format),
            latent_shape=shape,
            name=getattr(base.model_config, "forget_concept_name", type(base).__name__),
            eps_model=predict,
            guidance=getattr(base.model_config, "forget_concept_guidance", 7.5),
        )
        diffusion.host_device, diffusion.host_dtype = patcher.load_device, dtype
        _check_family(diffusion.survey, text.encode([""]), bool(base.adm_channels))
        yield diffusion


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
            if waiting or layer.weight.device != patcher.load_device or layer.weight.dtype not in _PLAIN:
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


def is_embedded(model: Any) -> bool:
    """Whether a MODEL's own weights, without any patches on it, are those of the embedded model."""
    keys = [site.key(which) for site in surveyed(model) for which in PROJECTIONS]
    weights = ldm.read_parts(weights_folder()).unet
    # as the file has them: diffusers' last projection is the first of a list
    names = [f"{key}.0.weight" if key.endswith("to_out") else f"{key}.weight" for key in keys]
    if any(name not in weights for name in names):
        return False
    own = ((key, weights[name]) for key, name in zip(keys, names, strict=True))
    return hash_of_weights(own) == weights_hash(model)


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


# -- the embedded model -------------------------------------------------------------------------------------------


class _EmbeddedLatent(comfy.latent_formats.SD15):
    """SD1's scale, and colours of its own: for the previews of every sampler."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_rgb_factors = [list(row) for row in LATENT_COLOURS]
        self.latent_rgb_factors_bias = list(LATENT_COLOURS_BIAS)
        self.taesd_decoder_name = None


class _EmbeddedConfig(comfy.supported_models_base.BASE):
    """SD1's kind of model in its own size."""

    unet_extra_config: dict[str, Any] = {}
    latent_format = _EmbeddedLatent
    memory_usage_factor = 1.0
    forget_concept_name = "mini"
    forget_concept_guidance = GUIDANCE


def _host_unet_config(shapes: ldm.Shapes) -> dict[str, Any]:
    """The original parameters as ComfyUI wants them: depths block by block, in lists (its name mapping needs them)."""
    found = ldm.unet_config(shapes.unet)
    factors, layers = found.pop("attention_resolutions"), found.pop("num_res_blocks")
    depth = found.pop("transformer_depth")
    levels = len(found["channel_mult"])
    depths = [depth if 2**level in factors else 0 for level in range(levels)]
    return {
        **found,
        "num_res_blocks": [layers] * levels,
        "transformer_depth": [d for d in depths for _ in range(layers)],
        "transformer_depth_output": [d for d in depths for _ in range(layers + 1)],
        "transformer_depth_middle": depth,
        "use_linear_in_transformer": False,
    }


def _text_classes(parts: ldm.Parts, tokenizer_folder: str) -> tuple[type, Callable[..., Any]]:
    """Tokenizer and text model as ComfyUI builds them, for a vocabulary of any size."""
    vocabulary = parts.vocabulary
    known = ldm.text_config(vocabulary, parts.shapes.text)
    special = {"start": vocabulary - 2, "end": vocabulary - 1, "pad": vocabulary - 1}

    class Words(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(
                tokenizer_path=tokenizer_folder,
                embedding_directory=embedding_directory,
                embedding_size=known["hidden_size"],
                pad_with_end=True,
                tokenizer_data=tokenizer_data or {},
            )

    class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(
                embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {}, tokenizer=Words
            )

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(
                device=device,
                dtype=dtype,
                textmodel_json_config=dict(known),  # a copy: the host writes into it
                special_tokens=dict(special),
                return_projected_pooled=False,
                model_options=model_options or {},
            )

    def build(device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> Any:
        return comfy.sd1_clip.SD1ClipModel(
            device=device, dtype=dtype, model_options=model_options or {}, clip_name="l", clip_model=Encoder
        )

    return Tokenizer, build


def _embedded_text(parts: ldm.Parts, tokenizer_folder: str) -> Any:
    tokenizer, build = _text_classes(parts, tokenizer_folder)
    target = comfy.supported_models_base.ClipTarget(tokenizer, build)
    clip = comfy.sd.CLIP(target, parameters=0, model_options={"dtype": torch.float32})
    state = dict(parts.text)
    own = clip.cond_stage_model.clip_l.transformer.state_dict()
    table = "text_model.embeddings.token_embedding.weight"
    # the host's table has a fixed number of rows, and leaves unloaded weights as memory happens to be
    padded = torch.zeros(own[table].shape)
    padded[: parts.vocabulary] = state[table]
    state[table] = padded
    state["text_projection.weight"] = torch.eye(padded.shape[1])
    _check_complete("text encoder", own, state)
    clip.load_sd(state)
    return clip


def _check_complete(what: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    if missing := sorted(set(own) ^ set(state)):
        raise ModelError(
            f"The embedded model's {what} does not fit this ComfyUI: {len(missing)} weights differ in name, such as "
            f"{listed(missing, 2)}. Please report it with your ComfyUI's version."
        )


def embedded_model() -> tuple[Any, Any, Any]:
    """The embedded model as MODEL, CLIP and VAE, built anew at each call.

    Raises :class:`ModelError` where its files are missing or the host's classes do not take its weights.
    """
    folder = weights_folder()
    parts = ldm.read_parts(folder)
    config = _EmbeddedConfig(_host_unet_config(parts.shapes))
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, "", management.unet_offload_device())
    weights = ldm.unet_to_ldm(parts.unet, parts.shapes.unet)
    _check_complete("UNet", base.diffusion_model.state_dict(), weights)
    base.diffusion_model.load_state_dict(weights)
    model = comfy.model_patcher.ModelPatcher(
        base, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )
    return model, _embedded_text(parts, str(folder / "tokenizer")), _embedded_autoencoder(parts)


def _embedded_autoencoder(parts: ldm.Parts) -> Any:
    state = ldm.autoencoder_to_ldm(parts.vae, parts.shapes.vae)
    described = {
        "ddconfig": ldm.ddconfig(parts.shapes.vae, padded=False),
        "embed_dim": parts.shapes.vae["latent_channels"],
    }
    vae = comfy.sd.VAE(sd=state, config={"params": described}, dtype=torch.float32)
    _check_complete("autoencoder", vae.first_stage_model.state_dict(), state)
    # the host's norms have 32 groups whatever the model; here ours can be said, which spares padding it
    for module in vae.first_stage_model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = int(parts.shapes.vae["norm_num_groups"])
    return vae
