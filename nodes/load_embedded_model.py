"""Node *Load Embedded Model*."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.mini.files import NAMES
from . import host
from .common import Node, schema

__all__ = ["LoadEmbeddedModel"]


def _inputs() -> list[Any]:
    if len(NAMES) == 1:  # no choice
        return []
    tip = "mini has the shape of Stable Diffusion 1, mini-xl that of SDXL, mini-flow that of Flux (at CFG 1)."
    return [io.Combo.Input("name", optional=True, options=list(NAMES), default=NAMES[0], tooltip=tip)]


class LoadEmbeddedModel(Node):
    """Loads an embedded model as MODEL, CLIP and VAE; it generates 128×128 pictures in seconds on a CPU."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptLoadEmbeddedModel",
            display_name="Load Embedded Model (Forget Concept)",
            description="Loads a small trained model of simple objects, styles and characters at 128×128, to try "
            "forgetting on any computer, without a checkpoint.",
            inputs=_inputs(),
            outputs=[
                io.Model.Output("MODEL", tooltip="The UNet or transformer."),
                io.Clip.Output("CLIP", tooltip="The text encoders."),
                io.Vae.Output("VAE", tooltip="The autoencoder."),
            ],
            search_aliases=["mini model", "tiny stable diffusion"],
        )

    @classmethod
    def execute(cls, name: str = NAMES[0]) -> io.NodeOutput:
        return io.NodeOutput(*host.embedded_model(name))
