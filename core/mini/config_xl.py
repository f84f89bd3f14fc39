"""Configuration of ``mini-xl``, the embedded model in the shape of Stable Diffusion XL.

As in SDXL: two CLIP text encoders, whose penultimate states stand side by side without a final norm; a pooled vector,
which is the second one's projection and is added to the time embedding together with the picture's sizes; no attention
at the finest level; linear projections into and out of the transformers. The autoencoder, the tokenizer and the noise
schedule are those of ``mini``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import TOKENS

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

# id of "!", with which SDXL's second tokenizer pads
PAD_2 = 0
_TEXT: dict[str, Any] = {"num_hidden_layers": 3, "max_position_embeddings": TOKENS}
TEXT: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 4 * 96,
    "num_attention_heads": 3,
    "hidden_act": "quick_gelu",
    "projection_dim": 96,
    **_TEXT,
}
TEXT_2: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 4 * 160,
    "num_attention_heads": 5,
    "hidden_act": "gelu",
    "projection_dim": 160,
    **_TEXT,
}
# of the sinusoids of each of the six sizes; hosts have SDXL's number built in
SIZE_WIDTH = 256
UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (64, 64, 64),
    "layers_per_block": 2,
    "cross_attention_dim": TEXT["hidden_size"] + TEXT_2["hidden_size"],
    "attention_head_dim": (2, 2, 2),  # diffusers' name for the *number* of heads
    "norm_num_groups": 32,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZE_WIDTH,
    "projection_class_embeddings_input_dim": TEXT_2["projection_dim"] + 6 * SIZE_WIDTH,
}


def new_unet() -> UNet2DConditionModel:
    """Create an untrained UNet with eleven cross-attention sites at the two coarser resolutions."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET)


def new_text_encoders(vocabulary: int) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Create both untrained text encoders; the last two token ids are start and end-of-text."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ids = {"vocab_size": vocabulary, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    return (
        CLIPTextModel(CLIPTextConfig(pad_token_id=vocabulary - 1, **ids, **TEXT)),
        CLIPTextModelWithProjection(CLIPTextConfig(pad_token_id=PAD_2, **ids, **TEXT_2)),
    )
