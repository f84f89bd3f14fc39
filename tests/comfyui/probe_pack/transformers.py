"""Diffusion transformers by the host's own classes, with drawn weights: text of the published width, little else."""

from __future__ import annotations

import importlib

import comfy.lora
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy_api.latest import io

from .sizes import _drawn, _part

_FLUX = {
    "image_model": "flux",
    "axes_dim": [16, 56, 56],
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "theta": 10000,
    "in_channels": 16,
    "out_channels": 16,
    "hidden_size": 256,
    "context_in_dim": 4096,
    "vec_in_dim": 768,
    "depth": 1,
    "depth_single_blocks": 1,
    "qkv_bias": True,
    "txt_ids_dims": [],
    "patch_size": 2,
    "guidance_embed": True,
}
_CHROMA = {
    **{key: value for key, value in _FLUX.items() if key != "guidance_embed"},
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 256,
    "hidden_dim": 256,
    "n_layers": 1,
    "vec_in_dim": None,
}
_FLUX2 = {
    **_FLUX,
    "image_model": "flux2",
    "axes_dim": [32, 32, 32, 32],
    "mlp_ratio": 3.0,
    "theta": 2000,
    "in_channels": 128,
    "out_channels": 128,
    "context_in_dim": 7680,
    "vec_in_dim": None,
    "global_modulation": True,
    "mlp_silu_act": True,
    "qkv_bias": False,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
    "patch_size": 1,
    "guidance_embed": False,
}
_SD3 = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 2,
    "num_blocks": 1,
    "input_size": None,
    "adm_in_channels": 2048,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}},
    "num_patches": 36864,
    "pos_embed_max_size": 192,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
}
_QWEN = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 1, "num_attention_heads": 2}
_Z_IMAGE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 256,
    "cap_feat_dim": 2560,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_WAN = {
    "image_model": "wan2.1",
    "dim": 256,
    "out_dim": 16,
    "num_heads": 2,
    "ffn_dim": 256,
    "num_layers": 1,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "in_dim": 16,
    "model_type": "t2v",
}
_HUNYUAN_IMAGE = {
    "image_model": "hunyuan_video",
    "in_channels": 64,
    "patch_size": [1, 1],
    "out_channels": 64,
    "vec_in_dim": None,
    "axes_dim": [64, 64],
    "context_in_dim": 3584,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "theta": 256,
    "qkv_bias": True,
    "byt5": True,
    "guidance_embed": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
_T5 = {"t5xxl_model_config": {"num_layers": 2, "d_ff": 64, "num_heads": 4, "d_kv": 16}}
_CLIP_L = {"clip_l_model_config": {"num_hidden_layers": 3}}
_CLIP_G = {"clip_g_model_config": {"num_hidden_layers": 3}}
_LANGUAGE = {"num_hidden_layers": 4, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}

# the model's class and configuration, its text's module, tokenizer and builder, and what is cut of the text encoders
KINDS = {
    "flux": ("Flux", _FLUX, "flux", "FluxTokenizer", "flux_clip", _T5 | _CLIP_L),
    "chroma": ("Chroma", _CHROMA, "pixart_t5", "PixArtTokenizer", "pixart_te", _T5),
    "sd3": ("SD3", _SD3, "sd3_clip", "SD3Tokenizer", "sd3_clip", _T5 | _CLIP_L | _CLIP_G),
    "flux2 klein": (
        "Flux2",
        _FLUX2,
        "flux",
        "KleinTokenizer",
        "klein_te",
        {"qwen3_4b_model_config": {**_LANGUAGE, "num_hidden_layers": 28}},
    ),
    "qwen image": (
        "QwenImage",
        _QWEN,
        "qwen_image",
        "QwenImageTokenizer",
        "te",
        {"qwen25_7b_model_config": _LANGUAGE},
    ),
    "z image": ("ZImage", _Z_IMAGE, "z_image", "ZImageTokenizer", "te", {"qwen3_4b_model_config": _LANGUAGE}),
    "hunyuan image": (
        "HunyuanImage21",
        _HUNYUAN_IMAGE,
        "hunyuan_image",
        "HunyuanImageTokenizer",
        "te",
        {"qwen25_7b_model_config": _LANGUAGE},
    ),
    "wan": ("WAN21_T2V", _WAN, "", "", "", {}),
    # of no family that is known here
    "aura flow": (
        "AuraFlow",
        {"dim": 128, "n_layers": 2, "n_double_layers": 1, "n_heads": 2, "global_conddim": 128, "max_seq": 4096},
        "aura_t5",
        "AuraT5Tokenizer",
        "AuraT5Model",
        {"pile_t5xl_model_config": {"num_layers": 2, "d_ff": 64, "num_heads": 4, "d_kv": 16}},
    ),
    "pixart": (
        "PixArtSigma",
        {"image_model": "pixart_sigma", "hidden_size": 128, "depth": 1, "num_heads": 2, "model_max_length": 300}
        | {"micro_condition": False, "input_size": 128, "pe_interpolation": 2.0},
        "pixart_t5",
        "PixArtTokenizer",
        "pixart_te",
        _T5,
    ),
}


def _has(kind):
    """Whether this version of the host has the classes."""
    name, _, module, tokenizer, *_ = KINDS[kind]
    if not hasattr(comfy.supported_models, name):
        return False
    return not module or hasattr(importlib.import_module(f"comfy.text_encoders.{module}"), tokenizer)


def _model(kind):
    name, described, *_ = KINDS[kind]
    config = getattr(comfy.supported_models, name)(dict(described))
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    base = config.get_model({}, "", cpu)
    own = base.diffusion_model.state_dict()
    base.diffusion_model.load_state_dict(_drawn(own, torch.float32, torch.Generator().manual_seed(0)))
    return comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)


def _clip(kind):
    _, _, module, tokenizer, builder, cut = KINDS[kind]
    found = importlib.import_module(f"comfy.text_encoders.{module}")
    encoder = getattr(found, builder)
    encoder = encoder if isinstance(encoder, type) else encoder()
    target = comfy.supported_models_base.ClipTarget(getattr(found, tokenizer), encoder)
    clip = comfy.sd.CLIP(target, parameters=0, model_options={"dtype": torch.float32, **cut})
    stage = clip.cond_stage_model
    with torch.no_grad():
        for name, value in _drawn(stage.state_dict(), torch.float32, torch.Generator().manual_seed(1)).items():
            comfy.utils.get_attr(stage, name).copy_(value)
    return clip


class Transformer(io.ComfyNode):
    """MODEL and CLIP of a family of diffusion transformers."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeTransformer",
            category="probe",
            inputs=[io.Combo.Input("kind", options=[kind for kind in KINDS if _has(kind)])],
            outputs=[io.Model.Output(), io.Clip.Output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, kind):
        model = _model(kind)
        try:
            found = _part("nodes.host").surveyed(model)
            facts = {"family": found.family, "entries": {entry.key: entry.width for entry in found.entries}}
        except _part("core.errors").UnknownFamilyError:
            facts = {"family": "", "entries": {}}
        return io.NodeOutput(model, _clip(kind) if KINDS[kind][2] else None, ui={"facts": [facts]})


class Delta(io.ComfyNode):
    """Of each patched weight: what the patched MODEL adds, against what the LoRA's own layers multiply to."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeDelta",
            category="probe",
            inputs=[io.Model.Input("model"), io.Custom("LORA_MODEL").Input("lora")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, lora):
        layers, worst = {}, 0.0
        for key, patches in model.patches.items():
            weight = comfy.utils.get_attr(model.model, key).detach().float()
            added = comfy.lora.calculate_weight(patches, weight.clone(), key) - weight
            name = key.removesuffix(".weight")
            up, down = (lora[f"{name}.lora_{part}.weight"].float() for part in ("up", "down"))
            alpha = lora.get(f"{name}.alpha")
            wanted = up @ down * (1.0 if alpha is None else float(alpha) / down.shape[0])
            worst = max(worst, float((added - wanted).norm() / wanted.norm()))
            layers[key] = list(weight.shape)
        named = {name.rpartition(".lora_up")[0] for name in lora if name.endswith(".lora_up.weight")}
        return io.NodeOutput(ui={"layers": [layers], "worst": [worst], "named": [len(named)]})


NODES = [Transformer, Delta]
