"""Adapter from a ComfyUI MODEL that is a diffusion transformer to the core's latent diffusion model.

These models are large, and the host moves them in and out of memory by its own rules. Nothing of them is touched here:
a closed form gets copies of the few layers that read text, and pictures are drawn through the host's own call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as management
import comfy.model_sampling
import torch
from torch import Tensor, nn

from ...core.errors import ModelError
from ...core.models.host_weights import PLAIN_DTYPES, HostLatentDiffusion
from ...core.models.latent_diffusion import LatentDiffusion
from ...core.models.model_survey import ModelSurvey
from ...core.models.schedules import flow_sigmas
from ...core.models.survey import survey
from ...core.models.text_states import TextStates
from ...core.models.transformer import TransformerSurvey, entries_alone
from .autoencoder import HostAutoencoder
from .declared import declared
from .transformer_text import TransformerText
from .weights import UNET, effective_weight

__all__ = ["HostVelocity", "has_frames", "transformer_diffusion"]

# classifier-free guidance that models are used with, by family and width of the text; 1 for those that are distilled
_GUIDANCE = {
    ("flux", 4096): 1.0,
    ("flux2", 15360): 1.0,
    ("flux2", 7680): 1.0,
    ("flux2", 12288): 1.0,
    ("lumina2", 2560): 1.0,  # Z-Image Turbo
    ("lumina2", 2304): 4.0,
    ("qwen-image", 3584): 2.5,
    ("chroma", 4096): 4.0,
    ("sd3", 4096): 4.5,
}
_USUAL_GUIDANCE = 5.0
_USUAL_PIXELS = 1024


def transformer_diffusion(patcher: Any, clip: Any, vae: Any, found: TransformerSurvey) -> LatentDiffusion:
    """The core's model of a MODEL, CLIP and VAE.

    Args:
        patcher: The MODEL.
        clip: Its CLIP.
        vae: Its VAE, or ``None``.
        found: The survey of the MODEL's transformer.

    Raises:
        ModelError: If the CLIP is of another family.
    """
    base = patcher.model
    text = TransformerText(clip, found)
    latents = base.latent_format
    frames = has_frames(latents)
    side = _USUAL_PIXELS // int(getattr(latents, "spacial_downscale_ratio", 8))
    dtype = base.manual_cast_dtype or base.get_dtype()
    own = entries_alone(found, lambda path: effective_weight(patcher, f"{UNET}{path}.weight"))
    return HostLatentDiffusion(
        own,
        text,
        None,
        "flow",
        device=patcher.load_device,
        dtype=dtype if dtype in PLAIN_DTYPES else torch.float32,
        vae=None if vae is None else HostAutoencoder(vae, latents, loads=True, frames=frames),
        latent_shape=(int(latents.latent_channels), *[declared(base.model_config, "forget_concept_side", side)] * 2),
        guidance=declared(
            base.model_config,
            "forget_concept_guidance",
            _GUIDANCE.get((found.family, found.context_dim), _USUAL_GUIDANCE),
        ),
        name=declared(base.model_config, "forget_concept_name", type(base).__name__),
        eps_model=_Velocity(patcher, found, survey(own), frames),
        shift=_shift(patcher),
    )


def has_frames(latents: Any) -> bool:
    """Whether latents of this format have an axis of frames."""
    return int(getattr(latents, "latent_dimensions", 2)) == 3


def _shift(patcher: Any) -> float:
    """The shift of the time steps, as set by a sampling node if there is one; 1 where there is none."""
    sampling = patcher.get_model_object("model_sampling")
    middle = float(sampling.percent_to_sigma(0.5)) if hasattr(sampling, "percent_to_sigma") else 0.5
    return middle / (1 - middle) if 0 < middle < 1 else 1.0


@contextmanager
def _with_hooks_of(copies: ModelSurvey, found: ModelSurvey) -> Iterator[None]:
    """Inside a ``with`` block, the forward hooks of the copied layers, such as a patch, also act on the host's own."""
    handles = []
    for entry in copies.entries:
        acting: list[Any] = list(entry.module._forward_hooks.values())

        def act(module: nn.Module, args: Any, output: Any, acting: list[Any] = acting) -> Any:
            for one in acting:
                changed = one(module, args, output)
                output = output if changed is None else changed
            return output

        if acting:
            handles.append(found.linear(entry.key).register_forward_hook(act))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class HostVelocity:
    """The host's own call of a model, as the velocity from the picture to the noise."""

    def __init__(self, patcher: Any, frames: bool) -> None:
        self._patcher, self._frames = patcher, frames

    def velocity(self, x: Tensor, sigma: Tensor, states: TextStates, length: int) -> Tensor:
        """The velocity of some rows.

        Args:
            x: Noisy latents, ``(n, c, h, w)``.
            sigma: Their share of noise, ``(n,)``.
            states: Text states of ``n`` prompts.
            length: How many states of each are read.
        """
        base = self._patcher.model
        seen = x.float().unsqueeze(2) if self._frames else x.float()
        with torch.inference_mode():
            conditions = base.extra_conds(
                noise=seen,
                device=x.device,
                cross_attn=states.hidden[:, :length],
                pooled_output=states.pooled,
                width=x.shape[-1] * 8,
                height=x.shape[-2] * 8,
            )
            given = {
                name: one.process_cond(batch_size=len(x), device=x.device).cond for name, one in conditions.items()
            }
            options = self._patcher.model_options["transformer_options"].copy()
            clean = base.apply_model(seen, sigma, transformer_options=options, **given)
            velocity = (seen - clean) / sigma.view(-1, *[1] * (seen.ndim - 1))
        velocity = velocity.clone()
        return velocity.squeeze(2) if self._frames else velocity


class _Velocity(HostVelocity):
    """The velocity of a flow model at time steps, with the patches that act on copies of its layers."""

    def __init__(self, patcher: Any, found: ModelSurvey, copies: ModelSurvey, frames: bool) -> None:
        super().__init__(patcher, frames)
        self._found, self._copies = found, copies
        self._sigmas = flow_sigmas()

    def __call__(self, x: Tensor, timesteps: Tensor, states: TextStates) -> Tensor:
        patcher = self._patcher
        if not isinstance(patcher.get_model_object("model_sampling"), comfy.model_sampling.CONST):
            raise ModelError(
                "This MODEL is sampled in a way that is not supported here: only a closed form (uce) works on it, and "
                "nothing that draws."
            )
        known = states.known()
        shape = [2 * len(x), *x.shape[1:]]
        management.load_models_gpu([patcher], memory_required=patcher.memory_required(shape))
        sigma = self._sigmas.to(x.device)[timesteps.long()].float()
        with _with_hooks_of(self._copies, self._found):
            if len(set(known)) == 1:
                return self.velocity(x, sigma, states, known[0])
            # prompts of several lengths: one after the other, because not every model takes a mask
            rows = [self.velocity(x[i : i + 1], sigma[i : i + 1], states.index([i]), known[i]) for i in range(len(x))]
            return torch.cat(rows)
