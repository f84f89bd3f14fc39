"""What the page shows of a running node (text, progress, previews), and the graph that it runs in."""

from __future__ import annotations

import json
import time
from typing import Any

import comfy.cli_args
import comfy.model_management as management
import comfy.utils
import torch
from server import PromptServer

from ...core.errors import ForgetConceptError
from ...core.models.images import to_bytes, to_pil
from ...core.models.latent_diffusion import LatentDiffusion
from ...core.progress import Progress, ProgressEvent
from ...core.service.progress_text import ProgressText

__all__ = ["ConceptPreview", "progress", "show_text", "workflow"]


def show_text(node_id: str | None, text: str) -> None:
    """Show ``text`` on the node; without a node id, or on hosts that cannot, do nothing."""
    instance: Any = getattr(PromptServer, "instance", None)
    if node_id is not None and hasattr(instance, "send_progress_text"):
        instance.send_progress_text(text, node_id)


def progress(node_id: str | None, preview: ConceptPreview | None = None) -> Progress:
    """A progress callback that updates a node's bar, preview and text, and raises the host's exception on Cancel."""
    bar = comfy.utils.ProgressBar(1)
    text = ProgressText()
    shown = 0.0

    def report(event: ProgressEvent) -> None:
        nonlocal shown
        management.throw_exception_if_processing_interrupted()
        line = text.line(event)
        picture = preview.picture() if preview is not None and preview.due(event) else None
        bar.update_absolute(event.step, max(event.total, 1), picture)
        now = time.monotonic()
        if now - shown >= 0.2 or event.step >= event.total:
            shown = now
            show_text(node_id, line)

    return report


class ConceptPreview:
    """Preview of the concept during training, generated in a few sampling steps, for :func:`progress`.

    The trained adapters are active while a training loop reports a step, so a picture generated there shows their
    effect. It uses its own random generator, so that previews do not change the training.
    """

    _STEPS = 8
    _SIDE = 256

    def __init__(self, diffusion: LatentDiffusion, model: Any, prompt: str, seed: int, every: int) -> None:
        """``every`` is the number of training steps between pictures; 0 for none."""
        self._diffusion, self._format = diffusion, model.model.latent_format
        self._prompt, self._seed, self._every = prompt, seed, every

    def due(self, event: ProgressEvent) -> bool:
        """Whether to generate a picture at this step; only training steps that are made have terms of a loss."""
        return self._every > 0 and bool(event.terms) and (event.step == 1 or event.step % self._every == 0)

    def picture(self) -> tuple[str, Any, int] | None:
        """A picture in the host's preview format.

        Returns:
            ``None`` without a VAE and without latent-to-RGB factors, and where the model draws no finite picture.
        """

        def stop(event: ProgressEvent) -> None:
            management.throw_exception_if_processing_interrupted()

        model = self._diffusion
        try:
            latents = model.sample(
                [self._prompt], [self._seed], self._STEPS, model.guidance, progress=stop, sampler="dpm++"
            )
        except ForgetConceptError:
            # a training that diverges draws nothing finite; its loop reports that, and names the learning rate
            return None
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
    """The running graph as stored in pictures (``prompt``, ``workflow``); empty if the host disables metadata."""
    if comfy.cli_args.args.disable_metadata:
        return {}
    found = {"prompt": hidden.prompt} if hidden.prompt else {}
    found |= hidden.extra_pnginfo or {}
    return {str(name): json.dumps(value) for name, value in found.items()}
