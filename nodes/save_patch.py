"""The node that writes a patch into the LoRA folder, with the workflow that made it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..core.files.names import fresh_file, patch_name
from ..core.files.writing import check_folder, make_folder, write_bytes
from ..core.formats import kohya
from ..core.formats.lora_state import patch_of
from ..core.service.preview import bars, png, row
from ..core.service.summaries import concept_names
from . import host
from .common import LORA, schema

__all__ = ["SaveForgetPatch"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_WORKFLOW = ("prompt", "workflow")


class SaveForgetPatch(io.ComfyNode):
    """A kohya LoRA with the patch's record and the running workflow in it, under a name that was never used before.

    Beside it a picture of the same name that carries the workflow too: either, dropped on the canvas, restores it.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptSavePatch",
            display_name="Save Forget Patch",
            description="Writes a patch into the LoRA folder under a new name, with its record and this workflow in "
            "it, and a preview picture. Every LoRA loader can load it; dropping the file or its picture on the canvas "
            "brings the workflow back.",
            inputs=[
                LORA.Input("lora", tooltip="The patch to save."),
                io.String.Input(
                    "filename",
                    default="forget/%concept%",
                    dynamic_prompts=False,
                    tooltip="Folders and name in the LoRA folder; %concept% is what the patch forgets. A number comes "
                    "behind it, so that nothing is ever written over.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(_DTYPES),
                    default="float32",
                    tooltip="float32: exact. float16: half the size, and nearly always as good.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="For the preview picture: up to four, side by side. Nothing: where and how much the patch "
                    "changes the model.",
                ),
            ],
            outputs=[
                LORA.Output("LORA_MODEL", tooltip="The patch as it came in."),
                io.String.Output("FILE", tooltip="The new file's name in the LoRA folder."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
            search_aliases=["save lora", "export patch"],
        )

    @classmethod
    def execute(cls, lora: Any, filename: str, precision: str, image: Tensor | None = None) -> io.NodeOutput:
        patch = patch_of(lora)
        *folders, stem = patch_name(filename, concept_names(patch.metadata))
        carried = host.workflow(cls.hidden)
        own = {name: text for name, text in patch.metadata.items() if name not in _WORKFLOW}
        patch = dataclasses.replace(patch, metadata={**own, **carried})
        root = host.lora_folder()
        folder = make_folder(check_folder(root.joinpath(*folders)))
        path = fresh_file(folder, stem, ".safetensors")
        picture = bars(patch) if image is None else row(image)
        kohya.save(patch, path, dtype=_DTYPES[precision])
        write_bytes(path.with_suffix(".preview.png"), png(picture, carried))
        name = path.relative_to(root).as_posix()
        size = path.stat().st_size / 1024
        host.show_text(cls.hidden.unique_id, f"saved: {name} ({size:,.0f} kB)")
        return io.NodeOutput(lora, name, ui=ui.PreviewImage(picture[None], cls=cls))
