"""The list of the pack's nodes, for ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .forget_concept import ForgetConcept
from .load_embedded_model import LoadEmbeddedModel

__all__ = ["ForgetConceptExtension"]


class ForgetConceptExtension(ComfyExtension):
    """What this pack gives to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ForgetConcept, LoadEmbeddedModel]
