"""The node that loads the small model that comes with this pack."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .common import schema

__all__ = ["LoadEmbeddedModel"]


class LoadEmbeddedModel(io.ComfyNode):
    """The embedded model as MODEL, CLIP and VAE: 128×128 pictures of a drawn world, in seconds on a CPU."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptLoadEmbeddedModel",
            display_name="Load Embedded Model (Forget Concept)",
            description="A small trained model that draws simple objects, styles and characters at 128×128: to try "
            "forgetting without a checkpoint, on any computer.",
            inputs=[],
            outputs=[
                io.Model.Output("MODEL", tooltip="The UNet."),
                io.Clip.Output("CLIP", tooltip="The text encoder."),
                io.Vae.Output("VAE", tooltip="The autoencoder."),
            ],
            search_aliases=["mini model", "tiny stable diffusion"],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*host.embedded_model())
