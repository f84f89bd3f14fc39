"""The embedded models as the host's own objects."""

from __future__ import annotations

from typing import Any

from ...core.errors import ModelError
from ...core.mini import recognition
from ...core.mini.files import NAMES, weights_folder
from ...core.mini.ldm import read_parts
from .embedded_flux import mini_flow
from .embedded_parts import autoencoder
from .embedded_sd import mini
from .embedded_sdxl import mini_xl
from .model import surveyed, weights_hash

__all__ = ["embedded_model", "embedded_name"]


def embedded_model(name: str = NAMES[0]) -> tuple[Any, Any, Any]:
    """Build an embedded model as MODEL, CLIP and VAE; every call returns new objects.

    Raises:
        ModelError: If its files are missing, or the host's classes do not accept its weights.
    """
    if name not in NAMES:
        raise ModelError(f"There is no embedded model '{name}': choose {', '.join(NAMES)}.")
    shared = weights_folder()
    parts, words = read_parts(shared), str(shared / "tokenizer")
    if name == "mini":
        made = mini(parts, words)
    else:
        made = {"mini-xl": mini_xl, "mini-flow": mini_flow}[name](weights_folder(name), words)
    return (*made, autoencoder(parts))


def embedded_name(model: Any) -> str | None:
    """The embedded model that a MODEL is by its own weights, without its patches; ``None`` for others."""
    return recognition.embedded_name(surveyed(model), weights_hash(model))
