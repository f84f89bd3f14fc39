"""The embedded model as the host's own objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.latent_formats
import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from torch import Tensor, nn

from ...core.errors import ModelError, listed
from ...core.mini import ldm
from ...core.mini.config import GUIDANCE, LATENT_COLOURS, LATENT_COLOURS_BIAS, UNET
from ...core.mini.files import weights_folder
from ...core.models.latent_diffusion import hash_of_weights
from ...core.models.model_survey import PROJECTIONS
from .model import surveyed, weights_hash

__all__ = ["embedded_model", "is_embedded"]


class _EmbeddedLatent(comfy.latent_formats.SD15):
    """SD1's latent scale, with the embedded model's own latent-to-RGB factors for sampler previews."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_rgb_factors = [list(row) for row in LATENT_COLOURS]
        self.latent_rgb_factors_bias = list(LATENT_COLOURS_BIAS)
        self.taesd_decoder_name = None


class _EmbeddedConfig(comfy.supported_models_base.BASE):
    """An SD1-type model at the size of the embedded one."""

    unet_extra_config: dict[str, Any] = {}
    latent_format = _EmbeddedLatent
    memory_usage_factor = 1.0
    forget_concept_name = "mini"
    forget_concept_guidance = GUIDANCE
    forget_concept_side = int(UNET["sample_size"])


def _host_unet_config(shapes: ldm.Shapes) -> dict[str, Any]:
    """The LDM parameters in ComfyUI's form: depths as a list per block, which its key mapping needs."""
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
    """ComfyUI's tokenizer and text model classes, for the vocabulary of the embedded model."""
    vocabulary = parts.vocabulary
    known = ldm.text_config(vocabulary, parts.shapes.text)
    special = {"start": vocabulary - 2, "end": vocabulary - 1, "pad": vocabulary - 1}

    class Vocabulary(comfy.sd1_clip.SDTokenizer):
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
                embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {}, tokenizer=Vocabulary
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
    # the host's table has a fixed number of rows, and leaves missing weights uninitialized
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
            f"The embedded model's {what} is incompatible with this ComfyUI: {len(missing)} weights differ in name, "
            f"such as {listed(missing, 2)}. Please report it with your ComfyUI version."
        )


def embedded_model() -> tuple[Any, Any, Any]:
    """Build the embedded model as MODEL, CLIP and VAE; every call returns new objects.

    Raises:
        ModelError: If its files are missing, or the host's classes do not accept its weights.
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
    # the host always builds group norms with 32 groups; setting ours here avoids padding the weights
    for module in vae.first_stage_model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = int(parts.shapes.vae["norm_num_groups"])
    return vae


def is_embedded(model: Any) -> bool:
    """Whether a MODEL's own weights, without its patches, are those of the embedded model."""
    keys = [site.key(which) for site in surveyed(model) for which in PROJECTIONS]
    weights = ldm.read_parts(weights_folder()).unet
    # keys of the file: diffusers' output projection is the first module of a list
    names = [f"{key}.0.weight" if key.endswith("to_out") else f"{key}.weight" for key in keys]
    if any(name not in weights for name in names):
        return False
    own = ((key, weights[name]) for key, name in zip(keys, names, strict=True))
    return hash_of_weights(own) == weights_hash(model)
