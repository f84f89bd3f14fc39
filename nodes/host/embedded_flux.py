"""`mini-flow` as the host's own objects: a model of Flux's kind, with its guidance distilled in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.t5
import torch

from ...core.mini import ldm
from ...core.mini.config import UNET
from ...core.mini.config_flow import TOKENS
from ...core.mini.flux_names import transformer_to_original
from . import embedded_parts as shared

__all__ = ["mini_flow"]

_PATCH = 2


class _Config(comfy.supported_models.FluxSchnell):
    """A Flux-type model at the size of the embedded one."""

    unet_config: dict[str, Any] = {}
    latent_format = shared.EmbeddedLatent
    memory_usage_factor = 1.0
    forget_concept_name = "mini-flow"
    forget_concept_guidance = 1.0
    forget_concept_side = int(UNET["sample_size"])


def _parameters(transformer: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the host's ``Flux`` for a diffusers configuration."""
    channels = transformer["in_channels"] // _PATCH**2
    return {
        "image_model": "flux",
        "in_channels": channels,
        "out_channels": channels,
        "vec_in_dim": transformer["pooled_projection_dim"],
        "context_in_dim": transformer["joint_attention_dim"],
        "hidden_size": transformer["num_attention_heads"] * transformer["attention_head_dim"],
        "mlp_ratio": 4.0,
        "num_heads": transformer["num_attention_heads"],
        "depth": transformer["num_layers"],
        "depth_single_blocks": transformer["num_single_layers"],
        "axes_dim": list(transformer["axes_dims_rope"]),
        "theta": 10000,
        "patch_size": _PATCH,
        "qkv_bias": True,
        "guidance_embed": False,
        "txt_ids_dims": [],
    }


def mini_flow(folder: Path, tokenizer_folder: str) -> tuple[Any, Any]:
    """MODEL and CLIP.

    Args:
        folder: Folder of the parts that are its shared.
        tokenizer_folder: Folder of CLIP's tokenizer.
    """
    from transformers import T5TokenizerFast

    transformer, described = ldm.read_part(folder, "transformer")
    config = _Config(_parameters(described))
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, "", management.unet_offload_device())
    weights = config.process_unet_state_dict(transformer_to_original(transformer, described))
    shared.check_complete("transformer", base.diffusion_model.state_dict(), weights)
    base.diffusion_model.load_state_dict(weights)
    clip_l, t5 = (ldm.read_part(folder, part) for part in ("text_encoder", "text_encoder_2"))
    t5_described = {**t5[1], "model_type": "t5", "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True}

    class Tokenizer(comfy.text_encoders.flux.FluxTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            self.clip_l = shared.clip_tokenizer(
                tokenizer_folder, clip_l[1]["hidden_size"], embedding_directory, tokenizer_data
            )
            self.t5xxl = comfy.sd1_clip.SDTokenizer(
                str(folder / "tokenizer_2"),
                embedding_directory=embedding_directory,
                embedding_size=t5_described["d_model"],
                embedding_key="t5xxl",
                tokenizer_class=T5TokenizerFast,
                has_start_token=False,
                pad_with_end=False,
                pad_to_max_length=False,
                max_length=99999999,
                min_length=TOKENS,
                tokenizer_data=tokenizer_data or {},
            )

    class Encoders(comfy.text_encoders.flux.FluxClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            torch.nn.Module.__init__(self)
            last = clip_l[1]["vocab_size"] - 1
            self.clip_l = shared.clip_encoder(clip_l[1], last, device, dtype, model_options)
            self.t5xxl = comfy.sd1_clip.SDClipModel(
                device=device,
                layer="last",
                dtype=dtype,
                textmodel_json_config=dict(t5_described),
                special_tokens={"end": 1, "pad": 0},
                model_class=comfy.text_encoders.t5.T5,
                enable_attention_masks=False,
                model_options=model_options or {},
            )
            self.dtypes = {dtype}

    target = comfy.supported_models_base.ClipTarget(Tokenizer, Encoders)
    clip = comfy.sd.CLIP(target, parameters=0, model_options={"dtype": torch.float32})
    stage = clip.cond_stage_model
    states = {
        "clip_l": shared.clip_state(stage.clip_l.transformer.state_dict(), ldm.clip_names(clip_l[0])),
        # the table is in the file once, and twice in transformers' module
        "t5xxl": {name: value for name, value in t5[0].items() if name != "encoder.embed_tokens.weight"},
    }
    return shared.patcher_of(base), shared.load_text(clip, states)
