"""Detects whether a host's loaded checkpoint is an embedded model, whatever its file name."""

from __future__ import annotations

from ..models.families.flux import FLUX
from ..models.latent_diffusion import hash_of_weights, hashed_keys
from ..models.model_survey import ModelSurvey
from .files import NAMES, weights_folder
from .ldm import read_part

__all__ = ["embedded_name"]

# of a transformer's text entries, by their canonical keys
_STORED = {entry.original: entry.diffusers for entry in FLUX.entries}


def embedded_name(found: ModelSurvey, model_hash: str) -> str | None:
    """The name of the embedded model that a UNet or transformer is; ``None`` for every other model.

    Args:
        found: Survey of the model.
        model_hash: Hash of the weights that tell base models apart.
    """
    keys = hashed_keys(found)
    # diffusers stores the output projection as the first module of a list
    names = [f"{_STORED.get(key, key)}{'.0' if key.endswith('to_out') else ''}.weight" for key in keys]
    for name in NAMES:
        weights, _ = read_part(weights_folder(name), "unet" if found.sites else "transformer", missing={})
        if any(stored not in weights for stored in names):
            continue
        if hash_of_weights((key, weights[stored]) for key, stored in zip(keys, names, strict=True)) == model_hash:
            return name
    return None
