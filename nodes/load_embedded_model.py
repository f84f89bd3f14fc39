"""The node that loads the small model that comes with this pack."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

from . import host

__all__ = ["LoadEmbeddedModel"]


class LoadEmbeddedModel(io.ComfyNode):
    """The embedded model as MODEL, CLIP and VAE: 128×128 pictures of a drawn world, in seconds on a CPU."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        extra: dict[str, Any] = {}
        if "search_aliases" in {field.name for field in dataclasses.fields(io.Schema)}:
            extra["search_aliases"] = ["mini model", "tiny stable diffusion"]
        return io.Schema(
            node_id="ForgetConceptLoadEmbeddedModel",
            display_name="Load Embedded Model (Forget Concept)",
            category="model_patches/unlearning",
            description="A small trained model that draws simple objects, styles and characters at 128×128: to try "
            "forgetting without a checkpoint, on any computer.",
            inputs=[],
            outputs=[
                io.Model.Output("MODEL"),
                io.Clip.Output("CLIP"),
                io.Vae.Output("VAE"),
            ],
            **extra,
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*host.embedded_model())
