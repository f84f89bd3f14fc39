"""What a person sees of a running node: text, progress, the concept as it fades; and the graph it runs in."""

from __future__ import annotations

import json
import time
from typing import Any

import comfy.cli_args
import comfy.model_management as management
import comfy.utils
import torch
from server import PromptServer

from ...core.models.images import to_bytes, to_pil
from ...core.models.latent_diffusion import LatentDiffusion
from ...core.progress import Progress, ProgressEvent
from ...core.service.progress_text import ProgressText

__all__ = ["Fading", "progress", "show_text", "workflow"]


def show_text(node_id: str | None, text: str) -> None:
    """Show ``text`` on the node, in the page that queued it."""
    instance: Any = getattr(PromptServer, "instance", None)
    if node_id is not None and hasattr(instance, "send_progress_text"):
        instance.send_progress_text(text, node_id)


def progress(node_id: str | None, fading: Fading | None = None) -> Progress:
    """A core progress callback: bar, picture and text on the node; it raises the host's own exception once Cancel is
    pressed."""
    bar = comfy.utils.ProgressBar(1)
    text = ProgressText()
    shown = 0.0

    def report(event: ProgressEvent) -> None:
        nonlocal shown
        management.throw_exception_if_processing_interrupted()
        line = text.line(event)
        picture = fading.picture() if fading is not None and fading.due(event) else None
        bar.update_absolute(event.step, max(event.total, 1), picture)
        now = time.monotonic()
        if now - shown >= 0.2 or event.step >= event.total:
            shown = now
            show_text(node_id, line)

    return report


class Fading:
    """The concept as the model shows it now, drawn in a few steps while it is trained: a preview for :func:`progress`.

    What is trained is on while a training reports its steps, so that a picture drawn there shows it. It has noise of
    its own: the training goes on as if there had been none.
    """

    _STEPS = 8
    _SIDE = 256

    def __init__(self, diffusion: LatentDiffusion, model: Any, prompt: str, seed: int, every: int) -> None:
        """``every``: training steps from one picture to the next, 0 for none."""
        self._diffusion, self._format = diffusion, model.model.latent_format
        self._prompt, self._seed, self._every = prompt, seed, every

    def due(self, event: ProgressEvent) -> bool:
        """Whether this step wants a picture: only trainings have a loss."""
        return self._every > 0 and event.loss is not None and (event.step == 1 or event.step % self._every == 0)

    def picture(self) -> tuple[str, Any, int] | None:
        """The picture as the host takes it, or ``None`` where these latents have no colours known."""

        def stop(event: ProgressEvent) -> None:
            management.throw_exception_if_processing_interrupted()

        model = self._diffusion
        latents = model.sample(
            [self._prompt], [self._seed], self._STEPS, model.guidance, progress=stop, sampler="dpm++"
        )
        if model.vae is not None:
            pixels = model.decode(latents)[0].movedim(0, -1)
        else:
            factors = getattr(self._format, "latent_rgb_factors", None)
            if factors is None:
                return None
            bias = getattr(self._format, "latent_rgb_factors_bias", None)
            colours = torch.tensor(factors, dtype=torch.float32)
            pixels = latents[0].float().cpu().movedim(0, -1) @ colours
            if bias is not None:
                pixels = pixels + torch.tensor(bias, dtype=torch.float32)
        return "JPEG", to_pil(to_bytes(pixels.movedim(-1, 0))), self._SIDE


def workflow(hidden: Any) -> dict[str, str]:
    """The graph that is running, as pictures carry it (``prompt``, ``workflow``); empty where the host is told not to
    write such things."""
    if comfy.cli_args.args.disable_metadata:
        return {}
    found = {"prompt": hidden.prompt} if hidden.prompt else {}
    found |= hidden.extra_pnginfo or {}
    return {str(name): json.dumps(value) for name, value in found.items()}
