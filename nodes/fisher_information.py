"""The node that measures which weights matter, once a model."""

from __future__ import annotations

import time
from typing import Any

from comfy_api.latest import io

from ..core.errors import RequestError
from ..core.files.workspace import Workspace
from ..core.methods.selective_amnesia import SelectiveAmnesia, asked_fisher
from ..core.request.settings import resolve_settings
from ..core.service.forms import MethodSettings
from ..core.training.fisher import KIND, fisher_information, fisher_key
from . import host
from .common import ForgetFisher, ForgetSettings, Measured, schema

__all__ = ["FisherInformation"]


class FisherInformation(io.ComfyNode):
    """Fisher information as Selective Amnesia wants it, kept in the host's user folder.

    The file is of the model's weights and the settings, so that every request on that model finds it again; a
    measurement that was cancelled goes on where it was.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptFisherInformation",
            display_name="Fisher Information (Forget Concept)",
            description="Measures which weights matter for everything else, for Selective Amnesia. Takes minutes once "
            "a model; afterwards it is read from the user folder.",
            inputs=[
                io.Model.Input("model", tooltip="The model that shall forget: the same as at the node that forgets."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Combo.Input(
                    "preset",
                    options=list(SelectiveAmnesia.presets),
                    default="tuned",
                    tooltip="The preset of Selective Amnesia it is measured for. A settings node that is connected "
                    "says it instead.",
                ),
                ForgetSettings.Input(
                    "method_settings",
                    optional=True,
                    tooltip="From the settings node of Selective Amnesia: the same as at the node that forgets.",
                ),
            ],
            outputs=[
                ForgetFisher.Output("FISHER", tooltip="For the input fisher of Forget Concept."),
                io.String.Output("REPORT", tooltip="What was measured, and where it is kept."),
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
                f"Fisher information is for Selective Amnesia, and the settings are of '{chosen.method}': connect "
                "those of Selective Amnesia, or none."
            )
        settings = resolve_settings(SelectiveAmnesia, chosen.preset, chosen.values)
        if not settings.ewc_weight:
            raise RequestError("With 'ewc_weight' 0 no Fisher information is used: raise it, or leave this node out.")
        workspace = Workspace(host.work_folder())
        prompts, asked = asked_fisher(settings)
        start = time.monotonic()
        with host.latent_diffusion(model, clip) as diffusion:
            keys = SelectiveAmnesia().keys(diffusion, settings)
            key = fisher_key(diffusion, keys, prompts, asked)
            there = int(workspace.metadata(KIND, key).get("samples", "0"))
            found = fisher_information(
                diffusion, keys, prompts, asked, workspace=workspace, progress=host.progress(cls.hidden.unique_id)
            )
        size = workspace.path(KIND, key).stat().st_size
        lines = [
            f"{len(found.values)} weights on {found.samples} pictures, "
            + (f"read from {there} of them" if there >= found.samples else f"{time.monotonic() - start:.1f} s"),
            f"kept in {workspace.path(KIND, key)} ({size / 1024**2:.1f} MB): it may be removed at any time",
        ]
        if 0 < there < found.samples:
            lines.append(f"{there} of the pictures were there from an earlier measurement that was cut short")
        words = "\n".join(lines)
        host.show_text(cls.hidden.unique_id, words)
        return io.NodeOutput(Measured(workspace, key, chosen), words)
