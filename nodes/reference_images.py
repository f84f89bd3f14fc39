"""Node *Reference Images for Concept*."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..core.errors import RequestError
from .common import ForgetImages, Node, Pictures, reported, schema

__all__ = ["ReferenceImages"]


class ReferenceImages(Node):
    """Assigns IMAGEs to a concept; chain nodes for several concepts or several batches."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptReferenceImages",
            display_name="Reference Images for Concept",
            description="Your pictures of a concept, at least three, for methods that use them (Forget-Me-Not with "
            "latents: images or inversion, Selective Amnesia with surrogate: images).",
            inputs=[
                io.Image.Input("images", tooltip="The pictures; cropped and resized to the model's size when used."),
                io.String.Input(
                    "concept",
                    default="",
                    dynamic_prompts=False,
                    tooltip="The concept they show, named as in the node that forgets. Empty: its only concept.",
                ),
                ForgetImages.Input(
                    "before", optional=True, tooltip="Pictures from another of these nodes, to which these are added."
                ),
            ],
            outputs=[ForgetImages.Output("CONCEPT_IMAGES", tooltip="All pictures, by concept.")],
            hidden=[io.Hidden.unique_id],
            search_aliases=["concept pictures", "training images"],
        )

    @classmethod
    def execute(cls, images: Any, concept: str, before: Pictures | None = None) -> io.NodeOutput:
        if images is None or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
            raise RequestError("The input 'images' is not a picture: connect an IMAGE output.")
        # cloned outside of inference mode, it is an ordinary tensor that autograd accepts
        with torch.inference_mode(False), torch.no_grad():
            found = _rgb(images.detach().clone().float().cpu()).movedim(-1, 1).clamp(0, 1) * 2 - 1
        pictures: Pictures = (*(before or ()), (concept.strip(), found.contiguous()))
        counts: dict[str, int] = {}
        for name, batch in pictures:
            counts[name] = counts.get(name, 0) + len(batch)
        words = "\n".join(f"{name or 'the only concept'}: {count} pictures" for name, count in counts.items())
        return reported(cls.hidden.unique_id, words, pictures)


def _rgb(images: torch.Tensor) -> torch.Tensor:
    """Convert to RGB ``(n, H, W, 3)``: grey is repeated, transparency is composited over white."""
    if images.shape[-1] == 1:
        return images.expand(-1, -1, -1, 3)
    if images.shape[-1] == 4:
        alpha = images[..., 3:]
        return images[..., :3] * alpha + (1 - alpha)
    return images
