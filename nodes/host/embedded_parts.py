"""What the embedded models share as the host's own objects: latents, tokenizers, CLIPs and the autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.latent_formats
import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import torch
from torch import Tensor, nn

from ...core.errors import ModelError, listed
from ...core.mini import ldm
from ...core.mini.config import LATENT_COLOURS, LATENT_COLOURS_BIAS

__all__ = [
    "EmbeddedLatent",
    "autoencoder",
    "check_complete",
    "clip_encoder",
    "clip_state",
    "clip_tokenizer",
    "load_text",
    "patcher_of",
    "unet_parameters",
]

_TABLE = "text_model.embeddings.token_embedding.weight"


class EmbeddedLatent(comfy.latent_formats.SD15):
    """SD1's latent scale, with the embedded models' own latent-to-RGB factors for sampler previews."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_rgb_factors = [list(row) for row in LATENT_COLOURS]
        self.latent_rgb_factors_bias = list(LATENT_COLOURS_BIAS)
        self.taesd_decoder_name = None


def check_complete(what: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise :class:`ModelError` unless a module of the host takes exactly these weights."""
    if missing := sorted(set(own) ^ set(state)):
        raise ModelError(
            f"The embedded model's {what} is incompatible with this ComfyUI: {len(missing)} weights differ in name, "
            f"such as {listed(missing, 2)}. Please report it with your ComfyUI version."
        )


def unet_parameters(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The LDM parameters in ComfyUI's form: depths as a list per block, which its key mapping needs."""
    found = {"use_linear_in_transformer": False, **ldm.unet_config(unet)}
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
    }


def patcher_of(base: Any) -> Any:
    """A MODEL of a model of the host."""
    return comfy.model_patcher.ModelPatcher(
        base, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def clip_tokenizer(folder: str, width: int, embeddings: Any, given: Any, pad_with_end: bool = True) -> Any:
    """The host's tokenizer of a CLIP, with the vocabulary of a folder."""
    return comfy.sd1_clip.SDTokenizer(
        tokenizer_path=folder,
        embedding_directory=embeddings,
        embedding_size=width,
        pad_with_end=pad_with_end,
        tokenizer_data=given or {},
    )


def clip_encoder(described: Mapping[str, Any], pad: int, device: Any, dtype: Any, options: Any, **changes: Any) -> Any:
    """The host's class of a CLIP text encoder.

    Args:
        described: Its configuration under transformers' names.
        pad: Id of the padding.
        device: Where it is made.
        dtype: Its dtype.
        options: The host's options.
        changes: Arguments of the host's class.
    """
    end = described["vocab_size"] - 1
    return comfy.sd1_clip.SDClipModel(
        device=device,
        dtype=dtype,
        textmodel_json_config=dict(described),  # a copy: the host writes into it
        special_tokens={"start": end - 1, "end": end, "pad": pad},
        model_options=options or {},
        **{"return_projected_pooled": False, **changes},
    )


def clip_state(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a CLIP text encoder as the host's module takes them.

    The host's table has a fixed number of rows, and it leaves missing weights uninitialized.
    """
    state = dict(stored)
    padded = torch.zeros(own[_TABLE].shape)
    padded[: len(state[_TABLE])] = state[_TABLE]
    state[_TABLE] = padded
    state.setdefault("text_projection.weight", torch.eye(padded.shape[1]))
    return state


def load_text(clip: Any, states: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """Load the text encoders of a CLIP, by the names of their modules in it; returns the CLIP."""
    for name, state in states.items():
        module = getattr(clip.cond_stage_model, name).transformer
        check_complete("text encoder", module.state_dict(), state)
        module.load_state_dict(state)
    return clip


def autoencoder(parts: ldm.Parts) -> Any:
    """The autoencoder of `mini`, which all of them share, as VAE."""
    state = ldm.autoencoder_to_ldm(parts.vae, parts.shapes.vae)
    described = {
        "ddconfig": ldm.ddconfig(parts.shapes.vae, padded=False),
        "embed_dim": parts.shapes.vae["latent_channels"],
    }
    vae = comfy.sd.VAE(sd=state, config={"params": described}, dtype=torch.float32)
    check_complete("autoencoder", vae.first_stage_model.state_dict(), state)
    # the host always builds group norms with 32 groups; setting ours here avoids padding the weights
    for module in vae.first_stage_model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = int(parts.shapes.vae["norm_num_groups"])
    return vae
