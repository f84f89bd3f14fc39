"""`mini` as the host's own objects: a model of Stable Diffusion 1's kind."""

from __future__ import annotations

from typing import Any

import comfy.model_management as management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch

from ...core.mini import ldm
from ...core.mini.config import GUIDANCE, UNET
from . import embedded_parts as shared

__all__ = ["mini"]


class _Config(comfy.supported_models_base.BASE):
    """An SD1-type model at the size of the embedded one."""

    unet_extra_config: dict[str, Any] = {}
    latent_format = shared.EmbeddedLatent
    memory_usage_factor = 1.0
    forget_concept_name = "mini"
    forget_concept_guidance = GUIDANCE
    forget_concept_side = int(UNET["sample_size"])


def mini(parts: ldm.Parts, tokenizer_folder: str) -> tuple[Any, Any]:
    """MODEL and CLIP.

    Args:
        parts: Weights and configurations.
        tokenizer_folder: Folder of CLIP's tokenizer.
    """
    config = _Config(shared.unet_parameters(parts.shapes.unet))
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, "", management.unet_offload_device())
    weights = ldm.unet_to_ldm(parts.unet, parts.shapes.unet)
    shared.check_complete("UNet", base.diffusion_model.state_dict(), weights)
    base.diffusion_model.load_state_dict(weights)
    described = ldm.text_config(parts.vocabulary, parts.shapes.text)

    def vocabulary(embedding_directory: Any = None, tokenizer_data: Any = None) -> Any:
        return shared.clip_tokenizer(tokenizer_folder, described["hidden_size"], embedding_directory, tokenizer_data)

    class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(
                embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {}, tokenizer=vocabulary
            )

    def encoder(device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> Any:
        return shared.clip_encoder(described, described["pad_token_id"], device, dtype, model_options)

    def build(device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> Any:
        return comfy.sd1_clip.SD1ClipModel(
            device=device, dtype=dtype, model_options=model_options or {}, clip_name="l", clip_model=encoder
        )

    target = comfy.supported_models_base.ClipTarget(Tokenizer, build)
    clip = comfy.sd.CLIP(target, parameters=0, model_options={"dtype": torch.float32})
    known = clip.cond_stage_model.clip_l.transformer.state_dict()
    return shared.patcher_of(base), shared.load_text(clip, {"clip_l": shared.clip_state(known, parts.text)})
