"""Small diffusion transformers of diffusers' own classes, one a family, and how each is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import rand
from torch import Tensor, nn

TEXT, POOLED_WIDTH, TOKENS_READ = 24, 16, 6


@dataclass(frozen=True)
class Small:
    """A class of diffusers with the arguments of a small model, and the rest of its call."""

    family: str
    name: str
    changes: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    pooled: bool = False
    text: str = "encoder_hidden_states"
    # whose loader of LoRA files is tried
    pipeline: str | None = None
    # arguments of the published model where they are not the class's own
    published: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def make(self, seed: int = 0) -> nn.Module:
        import diffusers

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(diffusers, self.name)(**self.changes).eval()
            for name, value in model.named_parameters():
                if name.endswith("pad_token"):  # diffusers leaves them uninitialized
                    nn.init.normal_(value)
        return model

    def full(self) -> nn.Module:
        """The published shape, on the meta device."""
        import diffusers

        with torch.device("meta"):
            return getattr(diffusers, self.name)(**self.published)

    def call(self, model: nn.Module, hidden: Tensor, pooled: Tensor | None = None) -> Tensor:
        """The prediction with text states ``(tokens, d)`` and a pooled vector ``(d_pooled,)``."""
        given: dict[str, Any] = self.inputs()
        given[self.text] = [hidden] if self.text == "cap_feats" else hidden[None]
        if self.pooled:
            given["pooled_projections"] = pooled[None]
        with torch.no_grad():
            found = model(**given, return_dict=False)[0]
        return found[0] if isinstance(found, list) else found


def _packed(channels: int, axes: int) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "hidden_states": rand(1, 16, channels),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.cat([torch.zeros(16, axes - 2), torch.cartesian_prod(torch.arange(4), torch.arange(4))], 1),
        "txt_ids": torch.zeros(TOKENS_READ, axes),
    }


def _mask() -> Tensor:
    return torch.ones(1, TOKENS_READ, dtype=torch.bool)


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
BLOCKS = {"num_layers": 1, "num_single_layers": 1}
ROPE = {"axes_dims_rope": (2, 2, 4)}
SMALL = (
    Small(
        "flux",
        "FluxTransformer2DModel",
        {
            **HEADS,
            **BLOCKS,
            **ROPE,
            "in_channels": 8,
            "joint_attention_dim": TEXT,
            "pooled_projection_dim": POOLED_WIDTH,
        },
        _packed(8, 3),
        pooled=True,
        pipeline="FluxPipeline",
    ),
    Small(
        "chroma",
        "ChromaTransformer2DModel",
        {**HEADS, **BLOCKS, **ROPE, "in_channels": 8, "joint_attention_dim": TEXT}
        | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        _packed(8, 3),
        pipeline="ChromaPipeline",
    ),
    Small(
        "flux2",
        "Flux2Transformer2DModel",
        {**HEADS, **BLOCKS, "in_channels": 8, "joint_attention_dim": TEXT, "axes_dims_rope": (2, 2, 2, 2)},
        lambda: {**_packed(8, 4)(), "guidance": torch.tensor([4.0])},
        pipeline="Flux2Pipeline",
    ),
    Small(
        "sd3",
        "SD3Transformer2DModel",
        {**HEADS, "num_layers": 2, "in_channels": 4, "out_channels": 4, "sample_size": 8, "pos_embed_max_size": 8}
        | {"joint_attention_dim": TEXT, "caption_projection_dim": 16, "pooled_projection_dim": POOLED_WIDTH},
        lambda: {"hidden_states": rand(1, 4, 8, 8), "timestep": torch.tensor([500.0])},
        pooled=True,
        pipeline="StableDiffusion3Pipeline",
    ),
    Small(
        "qwen-image",
        "QwenImageTransformer2DModel",
        {**HEADS, "num_layers": 1, **ROPE, "in_channels": 16, "out_channels": 4, "joint_attention_dim": TEXT},
        lambda: {
            "hidden_states": rand(1, 16, 16),
            "timestep": torch.tensor([0.5]),
            "img_shapes": [[(1, 4, 4)]],
            "txt_seq_lens": [TOKENS_READ],
            "encoder_hidden_states_mask": _mask(),
        },
        pipeline="QwenImagePipeline",
    ),
    Small(
        "z-image",
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        | {"cap_feat_dim": TEXT, "axes_dims": [2, 2, 4], "axes_lens": [64, 16, 16]},
        lambda: {"x": [rand(4, 1, 8, 8)], "t": torch.tensor([0.5])},
        text="cap_feats",
        pipeline="ZImagePipeline",
    ),
    Small(
        "lumina2",
        "Lumina2Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "hidden_size": 16, "num_layers": 1, "num_refiner_layers": 1}
        | {"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (2, 2, 4)}
        | {"axes_lens": (32, 32, 32), "cap_feat_dim": TEXT},
        lambda: {
            "hidden_states": rand(1, 4, 8, 8),
            "timestep": torch.tensor([0.5]),
            "encoder_attention_mask": _mask(),
        },
        published={"cap_feat_dim": 2304},
        pipeline="Lumina2Pipeline",
    ),
    Small(
        "wan",
        "WanTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": TEXT}
        | {"freq_dim": 8, "ffn_dim": 16, "num_layers": 1, "rope_max_seq_len": 16},
        lambda: {"hidden_states": rand(1, 4, 1, 4, 4), "timestep": torch.tensor([500.0])},
        pipeline="WanPipeline",
    ),
    Small(
        "hunyuan",
        "HunyuanImageTransformer2DModel",
        {**HEADS, **BLOCKS, "in_channels": 4, "out_channels": 4, "num_refiner_layers": 1, "rope_axes_dim": (4, 4)}
        | {"text_embed_dim": TEXT},
        lambda: {
            "hidden_states": rand(1, 4, 4, 4),
            "timestep": torch.tensor([500.0]),
            "encoder_attention_mask": _mask(),
        },
    ),
    Small(
        "hunyuan",
        "HunyuanVideoTransformer3DModel",
        {**HEADS, **BLOCKS, "in_channels": 4, "out_channels": 4, "num_refiner_layers": 1, "rope_axes_dim": (2, 2, 4)}
        | {"text_embed_dim": TEXT, "pooled_projection_dim": POOLED_WIDTH, "guidance_embeds": False},
        lambda: {
            "hidden_states": rand(1, 4, 1, 4, 4),
            "timestep": torch.tensor([500.0]),
            "encoder_attention_mask": _mask(),
        },
        pooled=True,
        pipeline="HunyuanVideoPipeline",
    ),
)
