"""Patches as files: kohya LoRA (what hosts load), peft adapter folders (what diffusers and peft load), and the context
map (the smallest form of a closed-form edit).

Importing this room registers its formats with :mod:`..patch.outlets`, where :meth:`Patch.save` and
:meth:`Patch.apply` find them.
"""

from __future__ import annotations

import os

from ..errors import PatchError
from ..files.safetensors_io import read_metadata
from ..models.model_survey import ModelSurvey
from ..patch.metadata import PatchMetadata
from ..patch.patch import Patch
from . import context_map, diffusers_file, kohya, peft

__all__ = ["context_map", "diffusers_file", "kohya", "load_patch", "peft"]


def load_patch(path: str | os.PathLike[str], survey: ModelSurvey | None = None) -> Patch:
    """Read a patch from a file of any format, or from a peft adapter folder.

    Args:
        path: The file.
        survey: The base model's survey; a context map is expanded for it.

    Raises:
        PatchError: The file cannot be read, or is a context map and ``survey`` is missing.
    """
    if os.path.isdir(path):
        return peft.load(path, survey)
    if PatchMetadata.from_strings(read_metadata(path)).format != context_map.FORMAT:
        return kohya.load(path, survey)
    if survey is None:
        raise PatchError(f"'{path}' is a context map, which needs a model to be expanded for: give the base model.")
    loaded, metadata = context_map.load(path)
    return context_map.expand(loaded, survey, metadata)
