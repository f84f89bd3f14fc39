"""Export of `mini-xl` for hosts: one checkpoint in SDXL's single-file layout, its YAML, and its second encoder's shape.

The second text encoder is an open_clip model there, whose shape hosts look up by name: whoever loads the checkpoint
registers the written configuration first (``open_clip.add_model_config``), and gives the tokens of the embedded models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..files.safetensors_io import write_safetensors
from ..patch.metadata import checkpoint_metadata
from . import config, ldm
from .config_xl import SIZE_WIDTH

__all__ = ["open_clip_config", "open_clip_names", "save_checkpoint", "yaml_text"]

ARCHITECTURE = "forget-concept-mini-xl"  # the name that the second text encoder's shape is registered under
_FIRST = "conditioner.embedders.0.transformer."
_SECOND = "conditioner.embedders.1.model."
_TOP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_QKV = ("q_proj", "k_proj", "v_proj")


def open_clip_names(state: Mapping[str, Tensor], text: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename a ``CLIPTextModelWithProjection``'s state dict to open_clip's, which multiplies by the projection from the
    right and keeps queries, keys and values in one matrix.

    Args:
        state: State dict, with its names in ``text_model``.
        text: The encoder's configuration.
    """
    found = {name: state[ours] for ours, name in _TOP.items()}
    found["text_projection"] = state["text_projection.weight"].T.contiguous()
    found["logit_scale"] = torch.zeros(())
    for i in range(int(text["num_hidden_layers"])):
        own, theirs = f"text_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for what in ("weight", "bias"):
            for ours, name in _LAYER.items():
                found[f"{theirs}{name}.{what}"] = state[f"{own}{ours}.{what}"]
            parts = [state[f"{own}self_attn.{part}.{what}"] for part in _QKV]
            found[f"{theirs}attn.in_proj_{what}"] = torch.cat(parts)
    return found


def open_clip_config(text: Mapping[str, Any]) -> dict[str, Any]:
    """The second text encoder as open_clip describes a model; what it says of pictures is as small as it may be."""
    width, projection = int(text["hidden_size"]), int(text["projection_dim"])
    return {
        "embed_dim": projection,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32},
        "text_cfg": {
            "context_length": int(text["max_position_embeddings"]),
            "vocab_size": int(text["vocab_size"]),
            "width": width,
            "heads": int(text["num_attention_heads"]),
            "layers": int(text["num_hidden_layers"]),
        },
    }


def yaml_text(text_folder: str, unet: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """Return the YAML file that hosts read along with the checkpoint.

    Args:
        text_folder: A folder with the first text encoder's configuration and tokenizer.
        unet: The UNet's diffusers configuration.
        first: The first text encoder's configuration.

    Raises:
        ModelError: PyYAML is not installed, or the original layout cannot express the UNet.
    """
    try:
        import yaml
    except ImportError as error:
        raise ModelError(f"Writing a checkpoint's configuration needs PyYAML ({error}): pip install pyyaml.") from error
    parameters = ldm.unet_config(unet)
    del parameters["image_size"]
    parameters["spatial_transformer_attn_type"] = "softmax-xformers"
    encoders = "sgm.modules.encoders.modules."
    kinds = [
        ("txt", "FrozenCLIPEmbedder", {"version": text_folder, "layer": "hidden", "layer_idx": _penultimate(first)}),
        (
            "txt",
            "FrozenOpenCLIPEmbedder2",
            {
                "arch": ARCHITECTURE,
                "version": "",
                "freeze": True,
                "layer": "penultimate",
                "always_return_pooled": True,
                "legacy": False,
            },
        ),
        *(
            (size, "ConcatTimestepEmbedderND", {"outdim": SIZE_WIDTH})
            for size in ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
        ),
    ]
    diffusion = "sgm.modules.diffusionmodules."
    tree = {
        "model": {
            "target": "sgm.models.diffusion.DiffusionEngine",
            "params": {
                "scale_factor": config.LATENT_SCALE,
                "disable_first_stage_autocast": True,
                "denoiser_config": {
                    "target": f"{diffusion}denoiser.DiscreteDenoiser",
                    "params": {
                        "num_idx": config.SCHEDULE["num_train_timesteps"],
                        "weighting_config": {"target": f"{diffusion}denoiser_weighting.EpsWeighting"},
                        "scaling_config": {"target": f"{diffusion}denoiser_scaling.EpsScaling"},
                        "discretization_config": {"target": f"{diffusion}discretizer.LegacyDDPMDiscretization"},
                    },
                },
                "network_config": {"target": f"{diffusion}openaimodel.UNetModel", "params": parameters},
                "conditioner_config": {
                    "target": "sgm.modules.GeneralConditioner",
                    "params": {
                        "emb_models": [
                            {"is_trainable": False, "input_key": key, "target": encoders + kind, "params": given}
                            for key, kind, given in kinds
                        ]
                    },
                },
                "first_stage_config": {
                    "target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
                    "params": {
                        "embed_dim": config.AUTOENCODER["latent_channels"],
                        "monitor": "val/rec_loss",
                        "ddconfig": {"attn_type": "vanilla", **ldm.ddconfig()},
                        "lossconfig": {"target": "torch.nn.Identity"},
                    },
                },
            },
        }
    }
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=False))


def _penultimate(text: Mapping[str, Any]) -> int:
    """The index among the hidden states, the embeddings being the first."""
    return int(text["num_hidden_layers"]) - 1


def save_checkpoint(
    folder: Path, shared: Path, path: Path, text_folder: Path, dtype: torch.dtype = torch.float16
) -> None:
    """Write the checkpoint, its YAML, and the second text encoder's shape as ``<text_folder>/<ARCHITECTURE>.json``.

    Args:
        folder: Folder of the parts of `mini-xl`.
        shared: Diffusers folder of `mini`, whose autoencoder it shares.
        path: The file, ``….safetensors``.
        text_folder: An existing folder with the first text encoder's configuration and tokenizer.
        dtype: Of the weights.

    Raises:
        ModelError: A part is missing.
        PatchError: A file is damaged, or the place cannot be written.
    """
    (unet, shape), (first, shape_1), (second, shape_2) = (
        ldm.read_part(folder, part) for part in ("unet", "text_encoder", "text_encoder_2")
    )
    described = yaml_text(str(text_folder.resolve()), shape, shape_1)
    vae = ldm.padded_autoencoder(ldm.autoencoder_to_ldm(ldm.read_part(shared, "vae")[0]))
    state = {ldm.UNET_PREFIX + name: tensor for name, tensor in ldm.unet_to_ldm(unet, shape).items()}
    state |= {ldm.VAE_PREFIX + name: tensor for name, tensor in vae.items()}
    state |= {_FIRST + name: tensor for name, tensor in ldm.clip_names(first).items()}
    state |= {_SECOND + name: tensor for name, tensor in open_clip_names(ldm.clip_names(second), shape_2).items()}
    stored = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    write_safetensors(stored, path, checkpoint_metadata("stable-diffusion-xl-v1-base", "mini-xl"))
    path.with_suffix(".yaml").write_text(described, encoding="utf-8")
    text = json.dumps(open_clip_config(shape_2), indent=1) + "\n"
    (text_folder / f"{ARCHITECTURE}.json").write_text(text, encoding="utf-8")
