"""Export of the embedded model for hosts: one checkpoint in the original latent-diffusion layout, and its YAML.

Pure functions on state dicts, for any number of levels and layers of an SD1-shaped model. They rename the weights and
pad the autoencoder, because hosts hard-code 32 groups in every norm and the embedded model has fewer. The widths are
multiplied to get 32 groups of the same size, and the added channels are zero throughout, so the network computes the
same function. Reading needs only safetensors, because a host may lack diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ForgetConceptError, ModelError
from ..files.json_text import parse_json
from ..files.reading import read_text
from ..files.safetensors_io import read_safetensors, write_safetensors
from ..patch.metadata import checkpoint_metadata
from . import config

__all__ = [
    "GROUPS",
    "Parts",
    "Shapes",
    "autoencoder_to_ldm",
    "checkpoint_state",
    "clip_names",
    "ddconfig",
    "padded_autoencoder",
    "read_part",
    "read_parts",
    "save_checkpoint",
    "text_config",
    "unet_config",
    "unet_to_ldm",
    "yaml_text",
]

State = dict[str, Tensor]
Pairs = list[tuple[str, str]]

GROUPS = 32  # of every norm in the original code

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."

_RESNET: Pairs = [
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
]
_VAE_RESNET: Pairs = [
    ("norm1.", "norm1."),
    ("conv1.", "conv1."),
    ("norm2.", "norm2."),
    ("conv2.", "conv2."),
    ("conv_shortcut.", "nin_shortcut."),
]
_VAE_ATTENTION: Pairs = [
    ("group_norm.", "norm."),
    ("to_q.", "q."),
    ("to_k.", "k."),
    ("to_v.", "v."),
    ("to_out.0.", "proj_out."),
]


# -- names: pairs (diffusers, LDM) of prefixes, each ending in a dot ----------------------------------------------


def _within(diffusers: str, ldm: str, inner: Pairs) -> Pairs:
    return [(diffusers + a, ldm + b) for a, b in inner]


def _unet_names(unet: Mapping[str, Any]) -> Pairs:
    down, up, layers = unet["down_block_types"], unet["up_block_types"], int(unet["layers_per_block"])
    levels = len(down)
    pairs: Pairs = [
        ("time_embedding.linear_1.", "time_embed.0."),
        ("time_embedding.linear_2.", "time_embed.2."),
        ("add_embedding.linear_1.", "label_emb.0.0."),
        ("add_embedding.linear_2.", "label_emb.0.2."),
        ("conv_in.", "input_blocks.0.0."),
        ("conv_norm_out.", "out.0."),
        ("conv_out.", "out.2."),
        ("mid_block.attentions.0.", "middle_block.1."),
    ]
    pairs += _within("mid_block.resnets.0.", "middle_block.0.", _RESNET)
    pairs += _within("mid_block.resnets.1.", "middle_block.2.", _RESNET)
    for i in range(levels):
        for j in range(layers):
            entry = f"input_blocks.{1 + (layers + 1) * i + j}."
            pairs += _within(f"down_blocks.{i}.resnets.{j}.", entry + "0.", _RESNET)
            if "CrossAttn" in down[i]:
                pairs.append((f"down_blocks.{i}.attentions.{j}.", entry + "1."))
        if i < levels - 1:
            pairs.append((f"down_blocks.{i}.downsamplers.0.conv.", f"input_blocks.{(layers + 1) * (i + 1)}.0.op."))
        attends = "CrossAttn" in up[i]
        for j in range(layers + 1):
            entry = f"output_blocks.{(layers + 1) * i + j}."
            pairs += _within(f"up_blocks.{i}.resnets.{j}.", entry + "0.", _RESNET)
            if attends:
                pairs.append((f"up_blocks.{i}.attentions.{j}.", entry + "1."))
        if i < levels - 1:
            last = f"output_blocks.{(layers + 1) * i + layers}."
            pairs.append((f"up_blocks.{i}.upsamplers.0.conv.", last + ("2.conv." if attends else "1.conv.")))
    return pairs


def _autoencoder_names(autoencoder: Mapping[str, Any]) -> Pairs:
    levels, layers = len(autoencoder["block_out_channels"]), int(autoencoder["layers_per_block"])
    pairs: Pairs = [("quant_conv.", "quant_conv."), ("post_quant_conv.", "post_quant_conv.")]
    for half in ("encoder.", "decoder."):
        pairs += _within(
            half, half, [("conv_in.", "conv_in."), ("conv_norm_out.", "norm_out."), ("conv_out.", "conv_out.")]
        )
        pairs += _within(half + "mid_block.resnets.0.", half + "mid.block_1.", _VAE_RESNET)
        pairs += _within(half + "mid_block.resnets.1.", half + "mid.block_2.", _VAE_RESNET)
        pairs += _within(half + "mid_block.attentions.0.", half + "mid.attn_1.", _VAE_ATTENTION)
    for i in range(levels):
        for j in range(layers):
            pairs += _within(f"encoder.down_blocks.{i}.resnets.{j}.", f"encoder.down.{i}.block.{j}.", _VAE_RESNET)
        # the original counts the decoder's levels from the finest on
        k = levels - 1 - i
        for j in range(layers + 1):
            pairs += _within(f"decoder.up_blocks.{i}.resnets.{j}.", f"decoder.up.{k}.block.{j}.", _VAE_RESNET)
        if i < levels - 1:
            pairs.append((f"encoder.down_blocks.{i}.downsamplers.0.conv.", f"encoder.down.{i}.downsample.conv."))
            pairs.append((f"decoder.up_blocks.{i}.upsamplers.0.conv.", f"decoder.up.{k}.upsample.conv."))
    return pairs


def _renamed(state: Mapping[str, Tensor], pairs: Pairs, what: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        # the longest prefix, because an upsampler's `1.conv.` also matches a transformer's `1.`
        found = max((pair for pair in pairs if name.startswith(pair[0])), key=lambda pair: len(pair[0]), default=None)
        if found is None:
            raise ModelError(
                f"The {what} has a weight '{name}' that no layer of its configuration has: use the matching files."
            )
        yield found[1] + name[len(found[0]) :], tensor


def unet_to_ldm(state: Mapping[str, Tensor], unet: Mapping[str, Any] = config.UNET) -> State:
    """Rename a diffusers UNet's state dict to the original names (``input_blocks.…``), without a prefix.

    Args:
        state: State dict.
        unet: The UNet's diffusers configuration.

    Raises:
        ModelError: If the state dict has a weight that this configuration does not have.
    """
    return dict(_renamed(state, _unet_names(unet), "UNet"))


def _is_vae_attention(name: str) -> bool:
    return ".attn_1." in name and ".norm." not in name and name.endswith(".weight")


def autoencoder_to_ldm(state: Mapping[str, Tensor], autoencoder: Mapping[str, Any] = config.AUTOENCODER) -> State:
    """Rename a diffusers AutoencoderKL's state dict to the original names, with attention as 1×1 convolutions."""
    renamed = dict(_renamed(state, _autoencoder_names(autoencoder), "autoencoder"))
    return {n: t[:, :, None, None] if _is_vae_attention(n) and t.ndim == 2 else t for n, t in renamed.items()}


# -- the autoencoder in hosts' norms ------------------------------------------------------------------------------

# (layer, axis) that keeps its width: pictures in and out, latents in and out
_ENDS = {("encoder.conv_in", 1), ("encoder.conv_out", 0), ("decoder.conv_in", 1), ("decoder.conv_out", 0)}


def _factor(autoencoder: Mapping[str, Any]) -> int:
    groups = int(autoencoder["norm_num_groups"])
    if GROUPS % groups:
        raise ModelError(
            f"An autoencoder with {groups} groups per norm cannot be padded to the hosts' {GROUPS}: use a divisor."
        )
    return GROUPS // groups


def _widened(name: str, tensor: Tensor) -> list[int]:
    """Axes of an LDM autoencoder's tensor that index internal channels."""
    layer = name.rpartition(".")[0]
    if layer in ("quant_conv", "post_quant_conv"):
        return []
    return [axis for axis in range(min(tensor.ndim, 2)) if (layer, axis) not in _ENDS]


def _query(name: str) -> bool:
    return ".attn_1.q." in name


def padded_autoencoder(state: Mapping[str, Tensor], autoencoder: Mapping[str, Any] = config.AUTOENCODER) -> State:
    """Pad an autoencoder, in LDM names, so that norms with 32 groups compute the same.

    Whole groups of zero channels are appended and stay zero through every layer. Attention is scaled by the square root
    of the width, which the queries compensate.

    Raises:
        ModelError: If 32 is not a multiple of the number of groups.
    """
    factor = _factor(autoencoder)
    found = {}
    for name, tensor in state.items():
        shape = list(tensor.shape)
        for axis in _widened(name, tensor):
            shape[axis] *= factor
        wide = tensor.new_zeros(shape)
        wide[tuple(slice(0, size) for size in tensor.shape)] = tensor * factor**0.5 if _query(name) else tensor
        found[name] = wide
    return found


# -- the whole model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """Configurations of the three parts, under diffusers' and transformers' names. Default: the embedded model's."""

    unet: Mapping[str, Any] = field(default_factory=lambda: config.UNET)
    vae: Mapping[str, Any] = field(default_factory=lambda: config.AUTOENCODER)
    text: Mapping[str, Any] = field(default_factory=lambda: config.TEXT)


@dataclass(frozen=True)
class Parts:
    """State dicts of the three parts, with diffusers' and transformers' names (``text_model.…`` for ``text``)."""

    unet: State
    vae: State
    text: State
    shapes: Shapes = Shapes()

    @property
    def vocabulary(self) -> int:
        """Number of token ids; the last is end-of-text and padding, the one before it start-of-text."""
        return self.text["text_model.embeddings.token_embedding.weight"].shape[0]


def checkpoint_state(parts: Parts) -> State:
    """Combine the parts into one state dict in the original layout.

    The prefixes are ``model.diffusion_model.``, ``first_stage_model.`` and ``cond_stage_model.transformer.``.
    """
    shapes = parts.shapes
    vae = padded_autoencoder(autoencoder_to_ldm(parts.vae, shapes.vae), shapes.vae)
    state = {UNET_PREFIX + n: t for n, t in unet_to_ldm(parts.unet, shapes.unet).items()}
    state |= {VAE_PREFIX + n: t for n, t in vae.items()}
    state |= {TEXT_PREFIX + n: t for n, t in parts.text.items()}
    return state


def read_parts(folder: Path) -> Parts:
    """Read the parts from a diffusers folder (``unet/``, ``vae/``, ``text_encoder/``), converted to fp32.

    Raises:
        ModelError: If a part is missing.
        PatchError: If a file is damaged.
    """
    unet, vae, text = (read_part(folder, part) for part in ("unet", "vae", "text_encoder"))
    return Parts(unet[0], vae[0], clip_names(text[0]), Shapes(unet[1], vae[1], text[1]))


def clip_names(state: Mapping[str, Tensor]) -> State:
    """A CLIP text encoder's weights as transformers 4 and hosts name them, in ``text_model``."""
    found = {n: t for n, t in state.items() if not n.endswith(".position_ids")}
    if any(name.startswith("text_model.") for name in found):
        return found
    # the naming of transformers 5; a projection stands beside the model
    return {n if n.startswith("text_projection") else f"text_model.{n}": t for n, t in found.items()}


def read_part(folder: Path, part: str, missing: State | None = None) -> tuple[State, dict[str, Any]]:
    """The state dict of one part of a diffusers folder, in fp32, and its configuration.

    Args:
        folder: The diffusers folder.
        part: Name of the part.
        missing: What is returned as the state dict where the folder has no such part; ``None``: an error.

    Raises:
        ModelError: If the part is missing, or its configuration cannot be read.
        PatchError: If the file is damaged.
    """
    if missing is not None and not (folder / part).is_dir():
        return missing, {}
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    names = [folder / part / f"{stem}{variant}.safetensors" for variant in (".fp16", "")]
    path = next((name for name in names if name.is_file()), None)
    described = folder / part / "config.json"
    if path is None or not described.is_file():
        lost = names[-1] if path is None else described
        raise ModelError(
            f"The embedded model is not there: '{lost}' is missing. Install the package again, or train the model "
            "(python -m forget_concept.core.mini.train)."
        )
    tensors, _ = read_safetensors(path)
    try:
        shape = parse_json(read_text(described, "The configuration"))
    except (ForgetConceptError, ValueError) as error:
        raise ModelError(f"'{described}' cannot be read: {error}.") from error
    return {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}, shape


# -- configurations -----------------------------------------------------------------------------------------------


def _multiples(widths: Sequence[int]) -> list[int]:
    if any(width % widths[0] for width in widths):
        raise ModelError(
            f"The widths {tuple(widths)} cannot be expressed in the original layout: make every width a whole multiple "
            "of the first one."
        )
    return [width // widths[0] for width in widths]


def unet_config(unet: Mapping[str, Any] = config.UNET) -> dict[str, Any]:
    """Convert a diffusers configuration to the parameters of the original ``UNetModel``.

    Raises:
        ModelError: If the original layout cannot express the widths, or the norms do not have 32 groups.
    """
    widths = unet["block_out_channels"]
    if int(unet["norm_num_groups"]) != GROUPS:
        raise ModelError(
            f"A UNet with {unet['norm_num_groups']} groups per norm cannot be exported: use {GROUPS}, as hosts do."
        )
    heads = unet["attention_head_dim"]
    found = {
        "image_size": unet["sample_size"],
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": widths[0],
        # resolutions with attention, as downsampling factors
        "attention_resolutions": [2**i for i, kind in enumerate(unet["down_block_types"]) if "CrossAttn" in kind],
        "num_res_blocks": unet["layers_per_block"],
        "channel_mult": _multiples(widths),
        "num_heads": heads if isinstance(heads, int) else heads[0],
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": unet["cross_attention_dim"],
        "use_checkpoint": False,
        "legacy": False,
        **({"use_linear_in_transformer": True} if unet.get("use_linear_projection") else {}),
    }
    if unet.get("addition_embed_type"):
        found |= {"num_classes": "sequential", "adm_in_channels": unet["projection_class_embeddings_input_dim"]}
    return found


def ddconfig(autoencoder: Mapping[str, Any] = config.AUTOENCODER, padded: bool = True) -> dict[str, Any]:
    """Return the ``ddconfig`` of the original ``AutoencoderKL``, for the padded or for the original weights."""
    widths = autoencoder["block_out_channels"]
    return {
        "double_z": True,
        "z_channels": autoencoder["latent_channels"],
        "resolution": autoencoder["sample_size"],
        "in_channels": autoencoder["in_channels"],
        "out_ch": autoencoder["out_channels"],
        "ch": widths[0] * (_factor(autoencoder) if padded else 1),
        "ch_mult": _multiples(widths),
        "num_res_blocks": autoencoder["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }


def text_config(vocabulary: int, text: Mapping[str, Any] = config.TEXT) -> dict[str, Any]:
    """Return the text encoder's configuration under transformers' names, including the special token ids."""
    ids = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    return {**{key: text[key] for key in config.TEXT}, "vocab_size": vocabulary, **ids}


def yaml_text(text_folder: str, shapes: Shapes | None = None) -> str:
    """Return the YAML file that hosts read along with the checkpoint.

    ``text_folder`` is a folder with the text encoder's configuration and tokenizer (transformers' ``from_pretrained``).
    Raises :class:`ModelError` where PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise ModelError(f"Writing a checkpoint's configuration needs PyYAML ({error}): pip install pyyaml.") from error
    shapes = shapes or Shapes()
    unet, channels = unet_config(shapes.unet), shapes.vae["latent_channels"]
    tree = {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": config.SCHEDULE["beta_start"],
                "linear_end": config.SCHEDULE["beta_end"],
                "num_timesteps_cond": 1,
                "log_every_t": 200,
                "timesteps": config.SCHEDULE["num_train_timesteps"],
                "first_stage_key": "jpg",
                "cond_stage_key": "txt",
                "image_size": unet["image_size"],
                "channels": channels,
                "cond_stage_trainable": False,
                "conditioning_key": "crossattn",
                "monitor": "val/loss_simple_ema",
                "scale_factor": config.LATENT_SCALE,
                "use_ema": False,
                "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.AutoencoderKL",
                    "params": {
                        "embed_dim": channels,
                        "monitor": "val/rec_loss",
                        "ddconfig": ddconfig(shapes.vae),
                        "lossconfig": {"target": "torch.nn.Identity"},
                    },
                },
                "cond_stage_config": {
                    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                    "params": {"version": text_folder, "max_length": config.TOKENS},
                },
            },
        }
    }
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=False))


def save_checkpoint(parts: Parts, path: Path, text_folder: str, dtype: torch.dtype = torch.float16) -> None:
    """Write the checkpoint ``path`` (``….safetensors``) and its YAML, with floating point weights in ``dtype``.

    Raises :class:`PatchError` where the place cannot be written.
    """
    described = yaml_text(text_folder, parts.shapes)
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in checkpoint_state(parts).items()}
    write_safetensors(state, path, checkpoint_metadata("stable-diffusion-v1", "mini"))
    path.with_suffix(".yaml").write_text(described, encoding="utf-8")
