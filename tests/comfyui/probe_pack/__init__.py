"""Nodes for the tests alone: they look at a MODEL's very memory, and make things go wrong inside of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from aiohttp import web
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import save_file
from server import BinaryEventTypes, PromptServer

from . import sizes, transformers


def _bytes(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach()
    if type(plain.data) is not torch.Tensor and hasattr(plain, "dequantize"):
        plain = plain.dequantize()
    return plain.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _digest(parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
    return digest.hexdigest()[:24]


def _original(model, key):
    """A weight without the patches of the MODEL."""
    kept = model.backup.get(key)
    return comfy.utils.get_attr(model.model, key) if kept is None else kept.weight


def _state(model) -> dict[str, str]:
    """Three hashes: the original weights; the memory as it is now; flags, addresses, identities and hooks."""
    # as this very MODEL is loaded: a clone with patches may have been the last one
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    inner = model.model
    keys = [f"{name}.weight" for name, part in inner.named_modules() if getattr(part, "weight", None) is not None]
    flags = []
    for name, part in inner.named_modules():
        flags += [
            name,
            part.training,
            len(part._forward_hooks),
            len(part._forward_pre_hooks),
            "forward" in part.__dict__,
        ]
        flags += [part.__dict__.get("comfy_cast_weights"), bool(part.__dict__.get("weight_function"))]
    for name, tensor in [*inner.named_parameters(), *inner.named_buffers()]:
        flags += [
            name,
            id(tensor),
            tensor.data_ptr(),
            tensor.requires_grad,
            tensor.is_inference(),
            tensor.device,
            tensor.dtype,
        ]
        flags += [tensor.grad is not None, tuple(tensor.stride())]
    flags += [sorted(model.patches), len(model.object_patches), sorted(model.backup)]
    return {
        "weights": _digest(x for key in sorted(keys) for x in (key, _bytes(_original(model, key)))),
        "memory": _digest(x for name, t in sorted(inner.state_dict().items()) for x in (name, _bytes(t))),
        "state": _digest(flags),
        "rng": _digest([_bytes(torch.random.get_rng_state())]),
    }


class Hash(io.ComfyNode):
    """Shows the hashes of a MODEL; `after` only sets the order."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeHash",
            category="probe",
            inputs=[io.Model.Input("model"), io.Model.Input("after", optional=True), io.Int.Input("nonce", default=0)],
            outputs=[io.Model.Output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, nonce, after=None):
        return io.NodeOutput(model, ui={"hash": [_state(model)]})


class Difference(io.ComfyNode):
    """The greatest difference of two pictures, in 1/255, and of two latents."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeDifference",
            category="probe",
            inputs=[io.Image.Input("a"), io.Image.Input("b")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, a, b):
        finite = bool(torch.isfinite(a).all() and torch.isfinite(b).all())
        spread = float(a.max() - a.min())
        return io.NodeOutput(
            ui={"difference": [float((a - b).abs().max()) * 255], "finite": [finite], "spread": [spread]}
        )


class Trap(io.ComfyNode):
    """Makes the UNet raise at its n-th call from now on: an error, out of memory, or as Cancel does. "none" disarms."""

    handle = None

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeTrap",
            category="probe",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("what", options=["none", "error", "memory", "cancel"]),
                io.Int.Input("call", default=1),
                io.Int.Input("nonce", default=0),
            ],
            outputs=[io.Model.Output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, what, call, nonce):
        if Trap.handle is not None:
            Trap.handle.remove()
            Trap.handle = None
        left = call

        def sprung(module, args):
            nonlocal left
            left -= 1
            if left > 0:
                return
            if what == "error":
                raise RuntimeError("the trap went off")
            if what == "memory":
                raise torch.OutOfMemoryError("the trap took all memory")
            comfy.model_management.interrupt_current_processing(True)

        if what != "none":
            Trap.handle = model.model.diffusion_model.register_forward_pre_hook(sprung)
        return io.NodeOutput(model, ui={"armed": [what]})


class Damage(io.ComfyNode):
    """Puts a NaN into a weight of a part, which every loader of the same file would share; "none" mends it."""

    mend = None

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeDamage",
            category="probe",
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                io.Combo.Input("part", options=["none", "unet", "text", "vae"]),
                io.Int.Input("nonce", default=0),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip, vae, part, nonce):
        if Damage.mend is not None:
            Damage.mend()
            Damage.mend = None
        parts = {"unet": model.model.diffusion_model, "text": clip.cond_stage_model, "vae": vae.first_stage_model}
        name = ""
        if part != "none":
            name, weight = next((n, p) for n, p in parts[part].named_parameters() if p.ndim > 1)
            values = weight.data.view(-1)
            own = values[0].clone()
            values[0] = torch.nan
            Damage.mend = lambda: values.__setitem__(0, own)
        return io.NodeOutput(model, clip, vae, ui={"damaged": [name]})


class NoAttention(io.ComfyNode):
    """A MODEL whose network reads no text through attention."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="ProbeNoAttention", category="probe", inputs=[], outputs=[io.Model.Output()])

    @classmethod
    def execute(cls):
        inner = torch.nn.Module()
        inner.diffusion_model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        device = torch.device("cpu")
        return io.NodeOutput(comfy.model_patcher.ModelPatcher(inner, load_device=device, offload_device=device))


class OtherText(io.ComfyNode):
    """A CLIP of another width than the given one's: its states doubled side by side."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeOtherText", category="probe", inputs=[io.Clip.Input("clip")], outputs=[io.Clip.Output()]
        )

    @classmethod
    def execute(cls, clip):
        class Wide(type(clip)):
            def encode_from_tokens(self, *args, **kwargs):
                states, pooled = super().encode_from_tokens(*args, **kwargs)
                return torch.cat([states, states], -1), pooled

            def clone(self):
                copied = super().clone()
                copied.__class__ = Wide
                return copied

        wide = clip.clone()
        wide.__class__ = Wide
        return io.NodeOutput(wide)


class LowMemory(io.ComfyNode):
    """Loads the MODEL as on a card with hardly any memory: weights offloaded, patches worked in at each use."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeLowMemory",
            category="probe",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model):
        class Partial(type(model)):
            def patch_model(self, device_to=None, lowvram_model_memory=0, load_weights=True, force_patch_weights=False):
                return super().patch_model(device_to, 0.1, load_weights, force_patch_weights)

        partial = model.clone()
        partial.__class__ = Partial
        return io.NodeOutput(partial)


class Core(io.ComfyNode):
    """Through the adapter of the pack: the core's sampler on the host's model and one prediction, saved to compare."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeCore",
            category="probe",
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                io.String.Input("prompt"),
                io.Int.Input("seed"),
                io.Int.Input("steps"),
                io.String.Input("name"),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip, vae, prompt, seed, steps, name):
        host = next(module for key, module in list(sys.modules.items()) if key.endswith(".nodes.host"))
        with host.latent_diffusion(model, clip) as diffusion:
            latents = diffusion.sample([prompt], [seed], steps=steps, guidance=3.0)
            states = diffusion.text.encode([prompt])
            noise = diffusion.initial_noise([seed])
            with torch.no_grad():
                predicted = diffusion.predict_noise(noise, torch.tensor([500]), states)
            facts = {
                "hash": diffusion.model_hash,
                "layer": diffusion.text.layer,
                "ids": diffusion.text.token_ids(prompt),
                "words": diffusion.text.phrase_ids(prompt),
            }
        picture = vae.decode(model.model.latent_format.process_out(latents))
        tensors = {
            "latents": latents,
            "states": states.hidden,
            "predicted": predicted,
            "picture": picture,
            "alphas": diffusion.alphas_cumprod,
        }
        plain = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
        save_file(plain, os.path.join(folder_paths.get_output_directory(), name))
        return io.NodeOutput(ui={"facts": [facts]})


class Narrow(io.ComfyNode):
    """The MODEL with its weights kept in a narrower dtype, as a checkpoint loaded so."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeNarrow",
            category="probe",
            inputs=[io.Model.Input("model"), io.Combo.Input("dtype", options=["bfloat16", "float16", "float8_e4m3fn"])],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, dtype):
        inner = model.model
        kept = {name: value.clone() for name, value in inner.diffusion_model.state_dict().items()}
        config = type(inner.model_config)(dict(inner.model_config.unet_config))
        config.set_inference_dtype(getattr(torch, dtype), torch.float32)
        made = config.get_model({}, "", torch.device("cpu"))
        made.diffusion_model.load_state_dict(kept)
        cpu = torch.device("cpu")
        return io.NodeOutput(comfy.model_patcher.ModelPatcher(made, load_device=cpu, offload_device=cpu))


class Quantised(io.ComfyNode):
    """The MODEL with the weights of its attention layers quantised, as the host loads such a checkpoint.

    Of Flux the layers that read the text are, too.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeQuantised",
            category="probe",
            inputs=[io.Model.Input("model"), io.Combo.Input("format", options=["int8_tensorwise", "float8_e4m3fn"])],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, format):
        inner = model.model
        kept = {name: value.clone() for name, value in inner.diffusion_model.state_dict().items()}
        mark = torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)
        largest, narrow = (127.0, torch.int8) if format.startswith("int8") else (448.0, torch.float8_e4m3fn)
        layers = r"(attn[12]\.(to_[qkv]|to_out\.0)|_attn\.qkv|txt_in|vector_in\.in_layer)\.weight$"
        for name in [name for name in kept if re.search(layers, name)]:
            scale = kept[name].float().abs().max() / largest
            values = kept[name].float() / scale
            layer = name.removesuffix(".weight")
            kept[name] = (values.round() if narrow is torch.int8 else values).to(narrow)
            kept |= {f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": mark.clone()}
        config = type(inner.model_config)(dict(inner.model_config.unet_config))
        config.quant_config = {"mixed_ops": True}
        config.set_inference_dtype(torch.float32, torch.float32)
        made = config.get_model({}, "", torch.device("cpu"))
        made.diffusion_model.load_state_dict(kept)
        cpu = torch.device("cpu")
        return io.NodeOutput(comfy.model_patcher.ModelPatcher(made, load_device=cpu, offload_device=cpu))


class Share(io.ComfyNode):
    """Of the weights that the host really made: how much of a patch's edit is in them."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ProbeShare",
            category="probe",
            inputs=[
                io.Model.Input("base"),
                io.Model.Input("patched"),
                io.Custom("LORA_MODEL").Input("lora"),
                io.Float.Input("strength"),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, base, patched, lora, strength):
        found = []
        for model in (base, patched):
            comfy.model_management.load_models_gpu([model], force_full_load=True)
            found.append({name: value.float().clone() for name, value in model.model.state_dict().items()})
        kept = total = 0.0
        for name in lora:
            if not name.endswith(".lora_up.weight"):
                continue
            layer = name.removesuffix(".lora_up.weight")
            delta = strength * (lora[name] @ lora[f"{layer}.lora_down.weight"])
            moved = found[1][f"{layer}.weight"] - found[0][f"{layer}.weight"]
            kept += float((moved.double() * delta.double()).sum())
            total += float(delta.double().square().sum())
        return io.NodeOutput(ui={"share": [kept / total]})


class Nothing(io.ComfyNode):
    """What a checkpoint without a part of it gives."""

    @classmethod
    def define_schema(cls):
        outputs = [io.Model.Output(), io.Clip.Output(), io.Custom("LORA_MODEL").Output(), io.Vae.Output()]
        return io.Schema(node_id="ProbeNothing", category="probe", inputs=[], outputs=outputs)

    @classmethod
    def execute(cls):
        return io.NodeOutput(None, None, None, None)


def _quantises() -> bool:
    """Whether the host knows layers of mixed precision, int8 among them."""
    try:
        from comfy.quant_ops import QUANT_ALGOS
    except ImportError:
        return False
    return "int8_tensorwise" in QUANT_ALGOS


class Probe(ComfyExtension):
    async def get_node_list(self):
        usual = [Hash, Difference, Trap, Damage, NoAttention, OtherText, LowMemory, Core, Narrow, Share, Nothing]
        return [*usual, *([Quantised] if _quantises() else []), *sizes.NODES, *transformers.NODES]


_told = []
_send = PromptServer.instance.send_sync


def _listen(event, data, sid=None):
    _told.append((str(getattr(event, "name", event)), data if isinstance(data, (bytes, bytearray)) else None))
    return _send(event, data, sid)


PromptServer.instance.send_sync = _listen


@PromptServer.instance.routes.get("/probe/told")
async def _tell(request):
    """How often each message went to the page since the last question, the texts, and how many previews."""
    counts, texts, pictures = {}, [], 0
    for event, data in _told:
        pictures += event in ("UNENCODED_PREVIEW_IMAGE", str(BinaryEventTypes.UNENCODED_PREVIEW_IMAGE))
        counts[event] = counts.get(event, 0) + 1
        if event in ("TEXT", str(BinaryEventTypes.TEXT)) and data is not None:  # an enum, or a plain number
            texts.append(bytes(data[4 + int.from_bytes(data[:4], "big") :]).decode())
    _told.clear()
    return web.json_response({"counts": counts, "texts": texts, "pictures": pictures})


async def comfy_entrypoint():
    return Probe()
