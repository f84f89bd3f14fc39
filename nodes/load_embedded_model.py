"""Node *Load Embedded Model*."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .common import Node, schema

__all__ = ["LoadEmbeddedModel"]


class LoadEmbeddedModel(Node):
    """Loads the embedded model as MODEL, CLIP and VAE; it generates 128×128 pictures in seconds on a CPU."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptLoadEmbeddedModel",
            display_name="Load Embedded Model (Forget Concept)",
            description="Loads a small trained model of simple objects, styles and characters at 128×128, to try "
            "forgetting on any computer, without a checkpoint.",
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
