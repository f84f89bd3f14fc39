"""Configuration of the embedded model in diffusers' and transformers' own classes.

A small version of Stable Diffusion 1's layout. What hosts derive from SD1's names must hold here too, hence two layers
per block (assumed by the webui's key mapping), widths in multiples of 32 (group norms), 77 tokens, end-of-text as
padding, and the scaling factor 0.18215.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

LATENT_SCALE = 0.18215
TOKENS = 77
# RGB factors and bias of the latent channels for hosts that preview latents: least squares on eight images (R² 0.96)
LATENT_COLOURS = (
    (-0.0743, -0.2700, -0.2106),
    (0.3186, 0.1321, -0.1318),
    (0.2798, 0.3339, 0.2729),
    (-0.1870, 0.0413, -0.1424),
)
LATENT_COLOURS_BIAS = (0.4118, 0.4111, 0.3474)
GUIDANCE = 2.5  # colours degrade above 3
TEXT_WIDTH = 192
HEADS = 4

AUTOENCODER: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    # Four channels per group. Hosts hard-code 32 groups; with one channel per group each norm would remove the mean
    # colour. The export for hosts (ldm.py) therefore pads the widths with zero channels, so that 32 groups of four
    # channels compute the same.
    "norm_num_groups": 8,
    "sample_size": 128,
    "scaling_factor": LATENT_SCALE,
    "force_upcast": False,
}
UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    # Multiples of the first width, because the original layout stores widths as integer factors.
    "block_out_channels": (64, 64, 64),
    "layers_per_block": 2,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": HEADS,  # diffusers' name for the *number* of heads in SD1's configuration
    "norm_num_groups": 32,
}
TEXT: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": TOKENS,
    "hidden_act": "quick_gelu",
    "projection_dim": TEXT_WIDTH,
}
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


def new_autoencoder() -> AutoencoderKL:
    """Create an untrained autoencoder between images `(n, 3, 128, 128)` in [-1, 1] and latents `(n, 4, 16, 16)`."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**AUTOENCODER)


def new_unet() -> UNet2DConditionModel:
    """Create an untrained UNet with eleven cross-attention sites at two resolutions."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET)


def new_text_encoder(vocabulary: int) -> CLIPTextModel:
    """Create an untrained CLIP text encoder; its last two token ids are start and end-of-text (also the padding)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    return CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, **ids, **TEXT))
