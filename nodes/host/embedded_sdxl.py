"""`mini-xl` as the host's own objects: a model of Stable Diffusion XL's kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import torch

from ...core.mini import ldm
from ...core.mini.config import GUIDANCE
from ...core.mini.config_xl import PAD_2, UNET
from . import embedded_parts as shared

__all__ = ["mini_xl"]


class _Config(comfy.supported_models.SDXL):
    """An SDXL-type model at the size of the embedded one."""

    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}  # SDXL's heads
    latent_format = shared.EmbeddedLatent
    memory_usage_factor = 1.0
    forget_concept_name = "mini-xl"
    forget_concept_guidance = GUIDANCE
    forget_concept_side = int(UNET["sample_size"])


def mini_xl(folder: Path, tokenizer_folder: str) -> tuple[Any, Any]:
    """MODEL and CLIP.

    Args:
        folder: Folder of the parts that are its shared.
        tokenizer_folder: Folder of CLIP's tokenizer.
    """
    unet, described = ldm.read_part(folder, "unet")
    config = _Config(shared.unet_parameters(described))
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, "", management.unet_offload_device())
    weights = ldm.unet_to_ldm(unet, described)
    shared.check_complete("UNet", base.diffusion_model.state_dict(), weights)
    base.diffusion_model.load_state_dict(weights)
    first, second = (ldm.read_part(folder, part) for part in ("text_encoder", "text_encoder_2"))

    class Tokenizer(comfy.sdxl_clip.SDXLTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            given = (embedding_directory, tokenizer_data)
            self.clip_l = shared.clip_tokenizer(tokenizer_folder, first[1]["hidden_size"], *given)
            self.clip_g = shared.clip_tokenizer(tokenizer_folder, second[1]["hidden_size"], *given, pad_with_end=False)

    class Encoders(comfy.sdxl_clip.SDXLClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            torch.nn.Module.__init__(self)
            made = {"layer": "hidden", "layer_idx": -2, "layer_norm_hidden_state": False}
            last = first[1]["vocab_size"] - 1
            self.clip_l = shared.clip_encoder(first[1], last, device, dtype, model_options, **made)
            self.clip_g = shared.clip_encoder(
                second[1], PAD_2, device, dtype, model_options, return_projected_pooled=True, **made
            )
            self.dtypes = {dtype}

    target = comfy.supported_models_base.ClipTarget(Tokenizer, Encoders)
    clip = comfy.sd.CLIP(target, parameters=0, model_options={"dtype": torch.float32})
    stage = clip.cond_stage_model
    states = {
        name: shared.clip_state(getattr(stage, name).transformer.state_dict(), ldm.clip_names(state))
        for name, (state, _) in (("clip_l", first), ("clip_g", second))
    }
    return shared.patcher_of(base), shared.load_text(clip, states)
