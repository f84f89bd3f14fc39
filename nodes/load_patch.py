"""Node *Load Forget Patch*."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.errors import PatchError, UnsupportedAdapterError
from ..core.files.safetensors_io import read_metadata, read_safetensors
from ..core.formats import context_map, kohya
from ..core.formats.contents import contents_of
from ..core.formats.lora_state import LoraState
from ..core.patch.metadata import PatchMetadata
from ..core.service.summaries import contents_summary, patch_summary
from . import host
from .common import LORA, Node, reported, schema

__all__ = ["LoadForgetPatch"]


class LoadForgetPatch(Node):
    """Loads a safetensors file as LORA_MODEL with its metadata; no code in the file is ever executed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ForgetConceptLoadPatch",
            display_name="Load Forget Patch",
            description="Loads a patch from the LoRA folders, with the record of what it forgets. Accepts any LoRA of "
            "a UNet's attention and feed-forward layers.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.lora_files(),
                    tooltip="A .safetensors file in the LoRA folders. Press R to refresh the list.",
                )
            ],
            outputs=[
                LORA.Output(
                    "LORA_MODEL", tooltip="The patch, for the other Forget Patch nodes or the stock LoRA nodes."
                ),
                io.String.Output("REPORT", tooltip="The description of the patch."),
            ],
            hidden=[io.Hidden.unique_id],
            search_aliases=["load lora", "open patch"],
        )

    @classmethod
    def fingerprint_inputs(cls, file: Any = None) -> str:
        return host.lora_stamp(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = host.lora_file(file)
        if PatchMetadata.from_strings(read_metadata(path)).format == context_map.FORMAT:
            raise PatchError(
                f"'{file}' is a context map, not a LoRA: load the patch that 'forget-concept forget' wrote with it."
            )
        tensors, metadata = read_safetensors(path)
        try:
            found = patch_summary(kohya.from_state(tensors, metadata, source=file))
        except UnsupportedAdapterError:  # for Inspect and the stock nodes; ours refuse to apply it
            found = "\n".join(contents_summary(contents_of(tensors, metadata, source=file)))
        words = f"{file}\n{found}"
        # keep the file's own keys: every loader knows them, and the UNet they will be applied to is not known yet
        return reported(
            cls.hidden.unique_id, words, LoraState(kohya.with_alphas(tensors, metadata, file), metadata), words
        )
