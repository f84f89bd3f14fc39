"""Models of the published shapes with drawn weights, by the host's own classes and, where it can be, its own loader."""

from __future__ import annotations

import sys
import time

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
from comfy_api.latest import io

import nodes as host_nodes

# what the host finds out from a checkpoint's names and shapes
_SHARED = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
_FOUR_LEVELS = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "adm_in_channels": None,
}
_SDXL = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
}
FAMILIES = {
    "sd15": (
        comfy.supported_models.SD15,
        _SHARED | _FOUR_LEVELS | {"use_linear_in_transformer": False, "context_dim": 768},
    ),
    # with attention on the small level alone: on a large one it takes as long as in the whole model
    "sd15, narrow": (
        comfy.supported_models.SD15,
        _SHARED
        | _FOUR_LEVELS
        | {
            "model_channels": 32,
            "use_linear_in_transformer": False,
            "context_dim": 768,
            "transformer_depth": [0, 0, 0, 0, 1, 1, 0, 0],
            "transformer_depth_output": [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0],
        },
    ),
    "sd15, inpainting": (
        comfy.supported_models.SD15,
        _SHARED | _FOUR_LEVELS | {"use_linear_in_transformer": False, "context_dim": 768, "in_channels": 9},
    ),
    "sd21": (
        comfy.supported_models.SD20,
        _SHARED | _FOUR_LEVELS | {"use_linear_in_transformer": True, "context_dim": 1024},
    ),
    "sdxl": (
        comfy.supported_models.SDXL,
        _SHARED
        | _SDXL
        | {
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "transformer_depth_middle": 10,
        },
    ),
    "sdxl, one transformer a block": (
        comfy.supported_models.SDXL,
        _SHARED
        | _SDXL
        | {
            "transformer_depth": [0, 0, 1, 1, 1, 1],
            "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
            "transformer_depth_middle": 1,
        },
    ),
}
_TEXT_LAYERS = 4


def _drawn(shapes, dtype, generator):
    """A state dict of those names and shapes: norms as they begin, everything else at a scale that passes through."""
    found = {}
    for name, tensor in shapes.items():
        shape = tensor.shape
        if name.endswith("bias") or not tensor.is_floating_point():
            value = torch.zeros(shape)
        elif "norm" in name or (len(shape) == 1 and name.endswith("weight")):
            value = torch.ones(shape)
        else:
            wide = shape[1:].numel() if len(shape) > 1 else 1
            scale = 0.02 if "embedding" in name else wide**-0.5
            value = torch.empty(shape).normal_(std=scale, generator=generator)
        found[name] = value.to(dtype)
    return found


def _checkpoint(kind):
    """A single-file checkpoint's state dict: the UNet's and the text encoder's names as such files have them."""
    generator = torch.Generator().manual_seed(0)
    config_class, described = FAMILIES[kind]
    config = config_class(described)
    unet = config.get_model({}, "", torch.device("meta")).diffusion_model.state_dict()
    state = config.process_unet_state_dict_for_saving(_drawn(unet, torch.float16, generator))
    if kind == "sd21":  # by this the host tells v prediction from noise prediction
        bias = state["model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"]
        bias.copy_(torch.empty(bias.shape).normal_(std=0.2, generator=generator))
    text = config.clip_target().clip(device="meta", dtype=torch.float16).state_dict()
    text = _drawn({name: value for name, value in text.items() if "logit_scale" not in name}, torch.float16, generator)
    return state | config.process_clip_state_dict_for_saving(text)


def _cut(kind):
    """Few layers in each text encoder, which else takes longer than everything else."""
    generator = torch.Generator().manual_seed(0)
    config_class, described = FAMILIES[kind]
    config = config_class(described)
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    base = config.get_model({}, "", cpu)
    base.diffusion_model.load_state_dict(_drawn(base.diffusion_model.state_dict(), torch.float32, generator))
    clip = comfy.sd.CLIP(config.clip_target(), parameters=0, model_options={"dtype": torch.float32})
    found = (getattr(clip.cond_stage_model, name, None) for name in ("clip_l", "clip_g"))
    for encoder in (part for part in found if part is not None):
        body = encoder.transformer.text_model.encoder
        body.layers = body.layers[:_TEXT_LAYERS]
        own = encoder.transformer.state_dict()
        encoder.transformer.load_state_dict(_drawn(own, torch.float32, generator))
    return comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu), clip


class TrueShape(io.ComfyNode):
    """MODEL and CLIP of a published architecture with drawn weights, and what the host found them to be."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeTrueShape",
            category="probe",
            inputs=[io.Combo.Input("kind", options=list(FAMILIES))],
            outputs=[io.Model.Output(), io.Clip.Output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, kind):
        if kind in ("sdxl, one transformer a block", "sd15, narrow"):
            model, clip = _cut(kind)
        else:
            model, clip, _, _ = comfy.sd.load_state_dict_guess_config(_checkpoint(kind), output_vae=False)
        facts = {
            "class": type(model.model.model_config).__name__,
            "prediction": model.model.model_type.name,
            "parameters": sum(p.numel() for p in model.model.diffusion_model.parameters()),
        }
        return io.NodeOutput(model, clip, ui={"facts": [facts]})


class Patches(io.ComfyNode):
    """What a MODEL carries: how many patches each weight has, and everything else that acts while it samples."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbePatches",
            category="probe",
            inputs=[io.Model.Input("model")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model):
        counts = {str(key): len(patches) for key, patches in model.patches.items()}
        kinds = (
            "callbacks",
            "wrappers",
            "hook_patches",
            "injections",
            "attachments",
            "additional_models",
            "object_patches",
        )
        others = {kind: _filled(getattr(model, kind, {})) for kind in kinds} | {"options": _filled(model.model_options)}
        return io.NodeOutput(ui={"weights": [len(counts)], "counts": [counts], "others": [others]})


def _filled(found):
    """A tree of what there is, by name, without its empty branches."""
    if isinstance(found, dict):
        tree = {str(key): _filled(value) for key, value in found.items()}
        return {key: value for key, value in tree.items() if value not in ({}, [])}
    if isinstance(found, (list, tuple)):
        return [_filled(value) for value in found]
    return type(found).__name__ if callable(found) else repr(found)


class Speed(io.ComfyNode):
    """Core seconds of the host's own sampling with each of two models, the best of some runs, once each is loaded."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeSpeed",
            category="probe",
            inputs=[
                io.Model.Input("a"),
                io.Model.Input("b"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent"),
                io.Int.Input("steps"),
                io.Int.Input("runs"),
                io.Int.Input("rounds"),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, a, b, positive, negative, latent, steps, runs, rounds):
        best = {"a": float("inf"), "b": float("inf")}
        for name, model in [("a", a), ("b", b)] * rounds:  # in turn: the machine may be busier at one time than another
            for run in range(1 + runs):
                start = time.process_time()
                host_nodes.common_ksampler(model, 1, steps, 5.0, "euler", "normal", positive, negative, latent)
                if run:  # the first one loads
                    best[name] = min(best[name], time.process_time() - start)
        return io.NodeOutput(ui={"seconds": [best]})


def _part(name):
    return next(module for key, module in list(sys.modules.items()) if key.endswith(f".{name}"))


class Survey(io.ComfyNode):
    """What the pack finds in an architecture whose weights are nowhere: the meta device."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeSurvey",
            category="probe",
            inputs=[io.Combo.Input("kind", options=list(FAMILIES))],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, kind):
        config_class, described = FAMILIES[kind]
        meta = torch.device("meta")
        base = config_class(described).get_model({}, "", meta)
        found = _part("nodes.host").surveyed(comfy.model_patcher.ModelPatcher(base, meta, meta))
        widths = sorted({site.module.to_k.weight.shape[0] for site in found})
        facts = {"family": found.family, "sites": len(found), "context_dim": found.context_dim, "widths": widths}
        facts["parameters"] = sum(p.numel() for p in base.diffusion_model.parameters())
        return io.NodeOutput(ui={"facts": [facts]})


class Cost(io.ComfyNode):
    """Seconds that Forget Concept takes with the instant method, and how many of them are the text encoder's.

    All that the node does is in it, from the request to the patched MODEL; the surviving share, which it reports of
    that, is told apart. Prompts are encoded in the first run; the others are given the same states.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeCost",
            category="probe",
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.String.Input("concept"),
                io.String.Input("preserve"),
                io.Int.Input("runs", default=1),
                io.Int.Input("threads", default=2),
                io.Int.Input("nonce", default=0),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip, concept, preserve, runs, threads, nonce):
        host, words = _part("nodes.host"), _part("core.request.parsing")
        methods, registry = _part("core.methods.fit"), _part("core.methods.registry")
        lora_state = _part("core.formats.lora_state")
        comfy.model_management.load_models_gpu([model, clip.patcher], force_full_load=True)
        encoder, before, found = host.text.HostText, torch.get_num_threads(), []
        own, known, encoding = encoder.encode, {}, 0.0
        apart = [0.0, 0.0]

        def timed(self, texts):
            nonlocal encoding
            begun, used = time.perf_counter(), time.process_time()
            key = tuple(texts)
            if key not in known:
                known[key] = own(self, texts)
                encoding += time.perf_counter() - begun
            apart[0] += time.perf_counter() - begun
            apart[1] += time.process_time() - used
            return known[key]

        encoder.encode = timed
        torch.set_num_threads(threads)
        try:
            for _ in range(runs):
                apart[:] = 0.0, 0.0
                start, spent = time.perf_counter(), time.process_time()
                request = words.parse_request(concept, "object", "", preserve, "uce", "tuned", 1.0, 0, "")
                with host.latent_diffusion(model, clip) as diffusion:
                    patch = methods.fit(diffusion, registry.plan_request(request))
                    lora = lora_state.state_of(patch, diffusion.survey)
                host.with_lora(model, lora)
                seconds, core = time.perf_counter() - start - apart[0], time.process_time() - spent - apart[1]
                start = time.perf_counter()
                share, _ = host.surviving_share(model, patch)
                found.append(
                    {
                        "threads": torch.get_num_threads(),
                        "prompts": sum(map(len, known)),
                        "rank": patch.rank,
                        "seconds": seconds,
                        "core_seconds": core,
                        "share_seconds": time.perf_counter() - start,
                        "encoding_seconds": encoding,
                        "patch_bytes": patch.nbytes,
                        "share": share,
                    }
                )
        finally:
            encoder.encode = own
            torch.set_num_threads(before)
        return io.NodeOutput(ui={"cost": found})


class LatentDifference(io.ComfyNode):
    """The greatest difference of two latents, relative to the first one's greatest value."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeLatentDifference",
            category="probe",
            inputs=[io.Latent.Input("a"), io.Latent.Input("b")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, a, b):
        first, second = a["samples"].float(), b["samples"].float()
        finite = bool(torch.isfinite(first).all() and torch.isfinite(second).all())
        ratio = float((first - second).abs().max() / first.abs().max())
        return io.NodeOutput(ui={"difference": [ratio], "finite": [finite]})


NODES = [TrueShape, Patches, Speed, Survey, Cost, LatentDifference]
