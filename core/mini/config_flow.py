"""Configuration of ``mini-flow``, the embedded model in the shape of Flux.

As in Flux: a transformer of double and single blocks over 2×2 patches of latents and T5's states, which T5 gives of the
padding as well; a pooled vector of CLIP, added to the time embedding; flow matching; and the guidance distilled into
the model, which is drawn with at guidance 1. The autoencoder and CLIP's tokenizer are those of ``mini``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import TOKENS as CLIP_TOKENS

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

# tokens that T5 reads, padding included
TOKENS = 48
T5: dict[str, Any] = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
CLIP: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 4 * 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": CLIP_TOKENS,
    "hidden_act": "quick_gelu",
    "projection_dim": 96,
}
TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,  # of 4 latent channels in patches of 2×2
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 48,
    "num_attention_heads": 4,
    "joint_attention_dim": T5["d_model"],
    "pooled_projection_dim": CLIP["hidden_size"],
    "guidance_embeds": False,
    "axes_dims_rope": (8, 20, 20),
}


def new_transformer() -> FluxTransformer2DModel:
    """Create an untrained transformer."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(**TRANSFORMER)


def new_text_encoders(clip_vocabulary: int, t5_vocabulary: int) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Create both untrained text encoders. CLIP's last two token ids are start and end-of-text (also the padding)."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    last = clip_vocabulary - 1
    ids = {"vocab_size": clip_vocabulary, "bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    t5 = T5Config(vocab_size=t5_vocabulary, pad_token_id=0, eos_token_id=1, **T5)
    return CLIPTextModel(CLIPTextConfig(**ids, **CLIP)), T5EncoderModel(t5)
