"""The library's front door: load a model by name or path."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .models.latent_diffusion import LatentDiffusion
from .models.loading import load_checkpoint

__all__ = ["load_model"]


def load_model(
    source: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    clip_skip: int = 1,
    config: str | os.PathLike[str] | None = None,
) -> LatentDiffusion:
    """Load a model for forgetting and sampling.

    ``source`` is ``"mini"`` (the embedded model) or what :func:`~.models.loading.load_checkpoint` takes; the other
    arguments are its. Raises :class:`ModelError` in words.
    """
    if str(source) == "mini":
        from .mini import load

        return load(device=str(device))
    return load_checkpoint(Path(source), device, dtype, clip_skip, config)
