"""The node that makes a model forget what a request file says."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.errors import RequestError
from ..core.request.request import ForgetRequest
from .common import RequestInputs, model_inputs, more_inputs, patch_outputs, schema
from .forget_concept import forgotten

__all__ = ["ForgetByRequest"]


class ForgetByRequest(io.ComfyNode):
    """*Forget Concept* with the whole request as JSON, the form that the command line and the webui read and write."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptByRequest",
            display_name="Forget by Request",
            description="Forgets what a request says: the JSON that the command line reads (--request), the webui's "
            "tab exports, and Inspect Forget Patch gives of a patch.",
            inputs=[
                *model_inputs(),
                io.String.Input(
                    "request",
                    multiline=True,
                    placeholder='{"schema": 1, "concepts": [{"name": "star"}]}',
                    default="",
                    dynamic_prompts=False,
                    tooltip="The request as JSON: the content of a request file.",
                ),
                *(one for one in more_inputs() if one.id not in ("settings", "method_settings")),
            ],
            outputs=patch_outputs(),
            hidden=[io.Hidden.unique_id],
            search_aliases=["forget json", "unlearn request", "request file"],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, request: str, **given: Any) -> io.NodeOutput:
        if not request.strip():
            raise RequestError("There is no request: put the content of a request file into the box, as JSON.")
        read = ForgetRequest.from_json(request)
        if pictures := [concept.name for concept in read.concepts if concept.images]:
            raise RequestError(
                f"The request names picture files of '{pictures[0]}', and this node reads no files: take them out of "
                "the JSON, and connect Reference Images for Concept."
            )
        return forgotten(cls.hidden.unique_id, model, clip, RequestInputs.of(read, **given))
