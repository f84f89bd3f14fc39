"""Node *Save Forget Patch*."""

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
from .common import LORA, Node, reported, schema

__all__ = ["SaveForgetPatch"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_WORKFLOW = ("prompt", "workflow")


class SaveForgetPatch(Node):
    """Saves a patch as a kohya LoRA, with its record and the running workflow as metadata; never overwrites a file.

    A preview picture of the same name carries the workflow too: either file, dropped on the canvas, restores it.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptSavePatch",
            display_name="Save Forget Patch",
            description="Saves a patch to the LoRA folder under a new name, with its record, this workflow and a "
            "preview picture. Every LoRA loader can load it; dropping the file or its picture on the canvas restores "
            "the workflow.",
            inputs=[
                LORA.Input("lora", tooltip="The patch to save."),
                io.String.Input(
                    "filename",
                    default="forget/%concept%",
                    dynamic_prompts=False,
                    tooltip="Path in the LoRA folder; %concept% stands for what the patch forgets. A number is "
                    "appended, so that no file is overwritten.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(_DTYPES),
                    default="float32",
                    tooltip="dtype of the file. float32: exact. float16: half the size, nearly always as good.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="Up to four pictures for the preview, side by side. Unconnected: a chart of how much the "
                    "patch changes each part of the model.",
                ),
            ],
            outputs=[
                LORA.Output("LORA_MODEL", tooltip="The patch, unchanged."),
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
        workflow = host.workflow(cls.hidden)
        own = {name: text for name, text in patch.metadata.items() if name not in _WORKFLOW}
        patch = dataclasses.replace(patch, metadata={**own, **workflow})
        root = host.lora_folder()
        folder = make_folder(check_folder(root.joinpath(*folders)))
        path = fresh_file(folder, stem, ".safetensors")
        picture = bars(patch) if image is None else row(image)
        kohya.save(patch, path, dtype=_DTYPES[precision])
        write_bytes(path.with_suffix(".preview.png"), png(picture, workflow))
        name = path.relative_to(root).as_posix()
        size = path.stat().st_size / 1024
        words = f"saved: {name} ({size:,.0f} kB)"
        shown = ui.PreviewImage(picture[None], cls=cls).as_dict()
        return reported(cls.hidden.unique_id, words, lora, name, ui=shown)
