"""The embedded model: a small trained Stable-Diffusion-shaped model and the world it draws.

Real enough to measure forgetting on a CPU in seconds: a latent diffusion model with a CLIP text encoder, a cross-
attention UNet and an autoencoder (diffusers' and transformers' own classes), and a probe that says what a picture
shows. Made by `train`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import weights_folder

if TYPE_CHECKING:
    from ..models.latent_diffusion import LatentDiffusion
    from .probe import Probe

__all__ = ["load", "load_modules", "load_probe", "weights_folder"]


def load_modules(device: str = "cpu", folder: Path | None = None) -> tuple[Any, Any, Any, Any]:
    """UNet, text encoder, tokenizer and autoencoder in fp32, as diffusers' and transformers' objects.

    Raises `ModelError` where the weights are missing or the two libraries are not installed.
    """
    from ..errors import ModelError

    folder = folder or weights_folder()
    if not (folder / "unet").is_dir():
        raise ModelError(f"The embedded model's weights are not in {folder}: install the package again.")
    try:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise ModelError(
            f"The embedded model needs diffusers and transformers ({error}): pip install diffusers transformers."
        ) from error
    import torch

    unet = UNet2DConditionModel.from_pretrained(folder / "unet", variant="fp16", torch_dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(folder / "vae", variant="fp16", torch_dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", variant="fp16", torch_dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    for module in (unet, vae, text):
        module.eval().requires_grad_(False).to(device)
    return unet, text, tokenizer, vae


def load(device: str = "cpu", folder: Path | None = None) -> LatentDiffusion:
    """The embedded model, fp32, named "mini". Raises as `load_modules`."""
    from ..models.autoencoders import DiffusersAutoencoder
    from ..models.latent_diffusion import LatentDiffusion
    from ..models.schedules import sd_alphas_cumprod
    from ..models.text_encoders import CLIPText
    from .config import GUIDANCE

    unet, text, tokenizer, vae = load_modules(device, folder)
    return LatentDiffusion(
        unet,
        CLIPText(text, tokenizer),
        sd_alphas_cumprod(),
        vae=DiffusersAutoencoder(vae),
        latent_shape=(4, 16, 16),
        name="mini",
        guidance=GUIDANCE,
    )


def load_probe(folder: Path | None = None) -> Probe:
    """The shipped probe: what a picture shows."""
    from .probe import load_probe as read

    return read(folder)
