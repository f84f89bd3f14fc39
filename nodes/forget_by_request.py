"""Node *Forget by Request*."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.errors import RequestError
from ..core.request.request import ForgetRequest
from .common import Node, RequestInputs, model_inputs, optional_request_inputs, patch_outputs, schema
from .forget_concept import run_request

__all__ = ["ForgetByRequest"]


class ForgetByRequest(Node):
    """*Forget Concept* with the whole request as JSON, the format that the command line and the webui use too."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptByRequest",
            display_name="Forget by Request",
            description="Forgets the concepts of a request in JSON, as read by the command line (--request), exported "
            "by the webui's tab, and returned by Inspect Forget Patch.",
            inputs=[
                *model_inputs(),
                io.String.Input(
                    "request",
                    multiline=True,
                    placeholder='{"schema": 1, "concepts": [{"name": "star"}]}',
                    default="",
                    dynamic_prompts=False,
                    tooltip="The content of a request file (JSON).",
                ),
                *(one for one in optional_request_inputs() if one.id not in ("settings", "method_settings")),
            ],
            outputs=patch_outputs(),
            hidden=[io.Hidden.unique_id],
            search_aliases=["forget json", "unlearn request", "request file"],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, request: str, **given: Any) -> io.NodeOutput:
        if not request.strip():
            raise RequestError("The input 'request' is empty: paste the content of a request file, as JSON.")
        read = ForgetRequest.from_json(request)
        if pictures := [concept.name for concept in read.concepts if concept.images]:
            raise RequestError(
                f"The request names image files for '{pictures[0]}', but this node reads no files: remove them from "
                "the JSON, and connect Reference Images for Concept."
            )
        return run_request(cls.hidden.unique_id, model, clip, RequestInputs.of(read, **given))
