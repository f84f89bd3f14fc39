"""A checkpoint that is recognised and not supported is refused by the name of its family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from forget_concept.core import mini
from forget_concept.core.errors import ModelError
from forget_concept.core.models.architectures import architecture_of
from forget_concept.core.models.unet import survey_unet


def of_keys(*paths: str) -> nn.Module:
    """A module with the submodules that a published checkpoint's keys name."""
    root = nn.Module()
    for path in paths:
        here = root
        for part in path.split("."):
            if part not in dict(here.named_children()):
                here.add_module(part, nn.Module())
            here = here.get_submodule(part)
    return root


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("Flux", ("img_in", "txt_in", "time_in.in_layer", "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1")),
        ("Chroma", ("img_in", "txt_in", "distilled_guidance_layer.layers.0", "double_blocks.0", "single_blocks.0")),
        ("Flux.2", ("img_in", "txt_in", "double_stream_modulation_img.lin", "double_blocks.0", "single_blocks.0")),
        ("Hunyuan", ("img_in.proj", "txt_in.input_embedder", "double_blocks.0", "single_blocks.0")),
        ("Stable Diffusion 3", ("x_embedder.proj", "context_embedder", "y_embedder.mlp", "joint_blocks.0.x_block")),
        ("AuraFlow", ("init_x_linear", "cond_seq_linear", "double_layers.0.attn", "single_layers.0.attn")),
        ("Qwen-Image", ("img_in", "txt_in", "txt_norm", "transformer_blocks.0.attn", "norm_out.linear")),
        ("Lumina 2 or Z-Image", ("x_embedder", "cap_embedder.0", "noise_refiner.0", "context_refiner.0", "layers.0")),
        ("Wan", ("patch_embedding", "text_embedding.0", "time_projection.1", "blocks.0.cross_attn", "head.head")),
        ("PixArt", ("x_embedder.proj", "t_block.1", "y_embedder.y_proj", "blocks.0.cross_attn", "final_layer.linear")),
    ],
)
def test_the_sentence_names_the_family_and_no_class(name: str, paths: tuple[str, ...]) -> None:
    module = of_keys(*paths)
    assert architecture_of(module) == name
    with pytest.raises(ModelError, match=f"^This is a {name} model") as raised:
        survey_unet(module)
    assert "another family" in str(raised.value) and "Module" not in str(raised.value)


@pytest.mark.skipif(not hasattr(nn, "RMSNorm"), reason="diffusers' transformers need torch 2.4 or later")
def test_diffusers_own_transformers() -> None:
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    small = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 8}
    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_single_layers=1, axes_dims_rope=(2, 2, 4), pooled_projection_dim=8, **small)
        sd3 = SD3Transformer2DModel(sample_size=8, caption_projection_dim=16, pooled_projection_dim=8, **small)
    assert (architecture_of(flux), architecture_of(sd3)) == ("Flux", "Stable Diffusion 3")
    assert architecture_of(mini.load().unet) is None
