"""The node that says which pictures show a concept."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..core.errors import RequestError
from . import host
from .common import ForgetImages, Pictures, schema

__all__ = ["ReferenceImages"]


class ReferenceImages(io.ComfyNode):
    """IMAGEs as pictures of a named concept; one behind another for several concepts, or several batches."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptReferenceImages",
            display_name="Reference Images for Concept",
            description="Your pictures of a concept, for methods that look at some (Forget-Me-Not with latents: images "
            "or inversion, Selective Amnesia with surrogate: images). At least three.",
            inputs=[
                io.Image.Input(
                    "images", tooltip="The pictures, cut and resized to the model's size where they are used."
                ),
                io.String.Input(
                    "concept",
                    default="",
                    dynamic_prompts=False,
                    tooltip="The concept they are of, as the node that forgets names it; empty: the only one there.",
                ),
                ForgetImages.Input(
                    "before", optional=True, tooltip="Pictures from another of these nodes: these come on top."
                ),
            ],
            outputs=[ForgetImages.Output("CONCEPT_IMAGES", tooltip="All pictures so far, by concept.")],
            hidden=[io.Hidden.unique_id],
            search_aliases=["concept pictures", "training images"],
        )

    @classmethod
    def execute(cls, images: Any, concept: str, before: Pictures | None = None) -> io.NodeOutput:
        if images is None or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
            raise RequestError("What came in is no picture: connect an IMAGE output.")
        # a clone made outside of inference mode is an ordinary tensor, which can take part in a training
        with torch.inference_mode(False), torch.no_grad():
            found = _rgb(images.detach().clone().float().cpu()).movedim(-1, 1).clamp(0, 1) * 2 - 1
        pictures: Pictures = (*(before or ()), (concept.strip(), found.contiguous()))
        counts: dict[str, int] = {}
        for name, batch in pictures:
            counts[name] = counts.get(name, 0) + len(batch)
        words = "\n".join(f"{name or 'the only concept'}: {count} pictures" for name, count in counts.items())
        host.show_text(cls.hidden.unique_id, words)
        return io.NodeOutput(pictures)


def _rgb(images: torch.Tensor) -> torch.Tensor:
    """``(n, H, W, 3)``: grey in all three, what is transparent over white."""
    if images.shape[-1] == 1:
        return images.expand(-1, -1, -1, 3)
    if images.shape[-1] == 4:
        alpha = images[..., 3:]
        return images[..., :3] * alpha + (1 - alpha)
    return images
