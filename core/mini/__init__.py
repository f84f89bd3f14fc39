"""The embedded model: a small trained latent diffusion model in the shape of Stable Diffusion 1, and its world.

It measures forgetting on a CPU in seconds. It consists of a CLIP text encoder, a cross-attention UNet and an
autoencoder, all in diffusers' and transformers' own classes, and of a probe that classifies its images. :mod:`.train`
trains all of them.
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
    """Load the embedded model's modules as diffusers' and transformers' objects, in fp32.

    Args:
        device: Device of the modules.
        folder: Diffusers folder of the model. Default: :func:`weights_folder`.

    Returns:
        UNet, text encoder, tokenizer and autoencoder.

    Raises:
        ModelError: If the weights are missing, or diffusers or transformers is not installed.
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
    from ..models.loading import without_progress_bars

    with without_progress_bars():
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", variant="fp16")
        vae = AutoencoderKL.from_pretrained(folder / "vae", variant="fp16")
        text = CLIPTextModel.from_pretrained(folder / "text_encoder", variant="fp16")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    for module in (unet, vae, text):
        module.eval().requires_grad_(False).to(device).float()
    return unet, text, tokenizer, vae


def load(device: str = "cpu", folder: Path | None = None) -> LatentDiffusion:
    """Load the embedded model in fp32, under the name "mini"; see :func:`load_modules` for arguments and errors."""
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
    """Load the trained probe, from ``folder`` or from :func:`weights_folder`."""
    from .probe import load_probe as read

    return read(folder)
