"""The ComfyUI extension that lists the pack's nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .apply_patch import ApplyForgetPatch
from .attention_map import ConceptAttentionMap
from .combine_patches import CombineForgetPatches
from .evaluate_forgetting import EvaluateForgetting
from .fisher_information import FisherInformation
from .forget_by_request import ForgetByRequest
from .forget_concept import ForgetConcept
from .forget_in_sequence import ForgetInSequence
from .inspect_patch import InspectForgetPatch
from .load_embedded_model import LoadEmbeddedModel
from .load_patch import LoadForgetPatch
from .reference_images import ReferenceImages
from .save_patch import SaveForgetPatch
from .settings_nodes import settings_nodes
from .take_back import TakeBack

__all__ = ["ForgetConceptExtension"]


class ForgetConceptExtension(ComfyExtension):
    """The pack's V3 extension."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            ForgetConcept,
            ForgetByRequest,
            ForgetInSequence,
            TakeBack,
            ReferenceImages,
            FisherInformation,
            LoadForgetPatch,
            SaveForgetPatch,
            ApplyForgetPatch,
            CombineForgetPatches,
            InspectForgetPatch,
            EvaluateForgetting,
            ConceptAttentionMap,
            LoadEmbeddedModel,
            *settings_nodes(),
        ]
