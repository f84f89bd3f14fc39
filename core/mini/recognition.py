"""Detects whether a host's loaded checkpoint is the embedded model, whatever its file name."""

from __future__ import annotations

from ..models.latent_diffusion import hash_of_weights
from ..models.model_survey import PROJECTIONS, ModelSurvey
from .files import weights_folder
from .ldm import read_parts

__all__ = ["is_embedded"]


def is_embedded(found: ModelSurvey, model_hash: str) -> bool:
    """Return whether a UNet is the embedded model's.

    Args:
        found: Survey of the UNet.
        model_hash: Hash of its cross-attention weights.
    """
    keys = [site.key(which) for site in found for which in PROJECTIONS]
    weights = read_parts(weights_folder()).unet
    # names in the file: diffusers stores the output projection as the first module of a list
    names = [f"{key}.0.weight" if key.endswith("to_out") else f"{key}.weight" for key in keys]
    if any(name not in weights for name in names):
        return False
    return hash_of_weights((key, weights[name]) for key, name in zip(keys, names, strict=True)) == model_hash
