"""Text entries of a MODEL of no known family, found by recording one prediction of the host's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ...core.errors import ForgetConceptError, ModelError
from ...core.formats.lora_state import patch_of
from ...core.models import recording
from ...core.models.text_states import TextStates
from .transformer import HostVelocity, has_frames

__all__ = ["adopt_layers", "record_text_entries"]

# prompts of different lengths, to tell a change of the text from everything else
_PROMPTS = ("a cat", "seven red houses by the sea")
_SIDE, _SHARE = 64, 0.7  # of the noisy latents, and how much of them is noise


def record_text_entries(patcher: Any, clip: Any) -> None:
    """Find where the text enters a MODEL; later surveys of it know.

    Args:
        patcher: The MODEL.
        clip: Its CLIP.

    Raises:
        ModelError: Nothing reads the text states first, or the MODEL and the CLIP do not go together.
    """
    base = patcher.model
    try:
        _record(patcher, clip)
    except (ForgetConceptError, management.InterruptProcessingException):
        raise
    except Exception as error:  # whatever a strange model raises, or one with another model's text encoder
        raise ModelError(
            f"This MODEL ({type(base).__name__}) has no cross-attention and is of no family that is known here, and it "
            f"could not be run to see where it reads the text ({error}): connect the CLIP that belongs to it."
        ) from error


def _record(patcher: Any, clip: Any) -> None:
    base = patcher.model
    frames = has_frames(base.latent_format)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, int(base.latent_format.latent_channels), _SIDE, _SIDE, generator=generator)
    one, other = (_encoded(clip, prompt) for prompt in _PROMPTS)
    management.load_models_gpu([patcher], memory_required=patcher.memory_required([2, *noise.shape[1:]]))
    call = HostVelocity(patcher, frames)
    x, sigma = noise.to(patcher.load_device), torch.tensor([_SHARE], device=patcher.load_device)

    def predict(states: TextStates) -> Tensor:
        return call.velocity(x, sigma, states, states.hidden.shape[1])

    recording.record(base.diffusion_model, predict, one, other)


def _encoded(clip: Any, prompt: str) -> TextStates:
    with torch.inference_mode():
        hidden, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    return TextStates(hidden.clone(), None if pooled is None else pooled.clone())


def adopt_layers(patcher: Any, lora: Mapping[str, Tensor]) -> bool:
    """Take a MODEL of no known family as one that a patch's layers were recorded in; whether it has all of them."""
    patch = patch_of(lora)
    if patch.about.family != recording.RECORDED:
        return False
    return recording.adopt(patcher.model.diffusion_model, patch.factors)
