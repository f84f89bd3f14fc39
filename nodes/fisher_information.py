"""Node *Fisher Information*."""

from __future__ import annotations

import time
from typing import Any

from comfy_api.latest import io

from ..core.errors import RequestError
from ..core.files.workspace import Workspace
from ..core.methods.selective_amnesia import SelectiveAmnesia, fisher_measurement
from ..core.request.settings import resolve_settings
from ..core.service.forms import MethodSettings
from ..core.training.fisher import KIND, fisher_information, fisher_key
from . import host
from .common import FisherFile, ForgetFisher, ForgetSettings, Node, reported, schema

__all__ = ["FisherInformation"]


class FisherInformation(Node):
    """Measures Fisher information for Selective Amnesia, and caches it in the host's user folder.

    The cache key depends on the model's weights and the settings only, so that every request on the model shares the
    file. A cancelled measurement resumes where it stopped.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptFisherInformation",
            display_name="Fisher Information (Forget Concept)",
            description="Measures for Selective Amnesia which weights matter for the retained concepts. Takes minutes, "
            "once per model; later runs read the result from the user folder.",
            inputs=[
                io.Model.Input("model", tooltip="The model to edit: the same as for the node that forgets."),
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                io.Combo.Input(
                    "preset",
                    options=list(SelectiveAmnesia.presets),
                    default="tuned",
                    tooltip="The preset of Selective Amnesia to measure for. A connected settings node overrides it.",
                ),
                ForgetSettings.Input(
                    "method_settings",
                    optional=True,
                    tooltip="From the settings node of Selective Amnesia: the same as for the node that forgets.",
                ),
            ],
            outputs=[
                ForgetFisher.Output("FISHER", tooltip="For the input fisher of Forget Concept."),
                io.String.Output("REPORT", tooltip="What was measured, and where it is stored."),
            ],
            hidden=[io.Hidden.unique_id],
            search_aliases=["ewc", "selective amnesia"],
        )

    @classmethod
    def execute(
        cls, model: Any, clip: Any, preset: str, method_settings: MethodSettings | None = None
    ) -> io.NodeOutput:
        chosen = method_settings or MethodSettings(SelectiveAmnesia.id, preset, {})
        if chosen.method != SelectiveAmnesia.id:
            raise RequestError(
                f"Fisher information is for Selective Amnesia, but the input 'method_settings' is for "
                f"'{chosen.method}': connect the settings of Selective Amnesia, or none."
            )
        settings = resolve_settings(SelectiveAmnesia, chosen.preset, chosen.values)
        if not settings.ewc_weight:
            raise RequestError("With 'ewc_weight' 0, Fisher information has no effect: raise it, or remove this node.")
        workspace = Workspace(host.work_folder())
        prompts, measurement = fisher_measurement(settings)
        start = time.monotonic()
        with host.latent_diffusion(model, clip) as diffusion:
            keys = SelectiveAmnesia().keys(diffusion, settings)
            key = fisher_key(diffusion, keys, prompts, measurement)
            cached = int(workspace.metadata(KIND, key).get("samples", "0"))
            found = fisher_information(
                diffusion, keys, prompts, measurement, workspace=workspace, progress=host.progress(cls.hidden.unique_id)
            )
        size = workspace.path(KIND, key).stat().st_size
        lines = [
            f"{len(found.values)} weights on {found.samples} pictures, "
            + (f"read from {cached} of them" if cached >= found.samples else f"{time.monotonic() - start:.1f} s"),
            f"stored in {workspace.path(KIND, key)} ({size / 1024**2:.1f} MB): it can be deleted at any time",
        ]
        if 0 < cached < found.samples:
            lines.append(f"{cached} of the pictures come from an earlier, interrupted measurement")
        words = "\n".join(lines)
        return reported(cls.hidden.unique_id, words, FisherFile(workspace, key, chosen), words)
