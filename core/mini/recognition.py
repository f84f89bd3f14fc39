"""Whether a host's loaded checkpoint is the embedded model, whatever its file is called."""

from __future__ import annotations

from ..models.latent_diffusion import hash_of_weights
from ..models.unet import PROJECTIONS, UNetSurvey
from .files import weights_folder
from .ldm import read_parts

__all__ = ["is_embedded"]


def is_embedded(found: UNetSurvey, model_hash: str) -> bool:
    """Whether a UNet whose cross-attention weights have ``model_hash`` is the embedded model's."""
    keys = [site.key(which) for site in found for which in PROJECTIONS]
    weights = read_parts(weights_folder()).unet
    # as the file has them: diffusers' last projection is the first of a list
    names = [f"{key}.0.weight" if key.endswith("to_out") else f"{key}.weight" for key in keys]
    if any(name not in weights for name in names):
        return False
    return hash_of_weights((key, weights[name]) for key, name in zip(keys, names, strict=True)) == model_hash
