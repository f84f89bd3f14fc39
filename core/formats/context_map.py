"""The context map as a file, and its expansion into a patch for one base model.

A closed form with one solve for all K and V gives ``ΔW = W M`` at every site, so the edit is the linear map
``c ↦ (I + M) c`` of the text states. The two factors of ``M`` fit every checkpoint with the same text encoder.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import torch

from ..errors import PatchError
from ..files.safetensors_io import read_safetensors, widened, write_safetensors
from ..models.unet import UNetSurvey
from ..patch.low_rank import LowRank
from ..patch.metadata import PatchMetadata
from ..patch.outlets import saves_as
from ..patch.patch import Patch

__all__ = ["FORMAT", "expand", "load", "save"]

_UP, _DOWN = "context_map.up", "context_map.down"
FORMAT = "context_map"


@saves_as("context-map")
def save(
    patch: Patch,
    path: str | os.PathLike[str],
    survey: UNetSurvey | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the context map of a patch.

    Raises:
        PatchError: The patch has no context map, or the file cannot be written.
    """
    if patch.context_map is None:
        raise PatchError("This patch has no context map: only a closed form with one solve for all sites has one.")
    tensors = {_UP: patch.context_map.up.to(dtype), _DOWN: patch.context_map.down.to(dtype)}
    write_safetensors(tensors, path, {**patch.metadata, **PatchMetadata(format=FORMAT).to_strings()})


def load(path: str | os.PathLike[str]) -> tuple[LowRank, dict[str, str]]:
    """Read a context map and its metadata.

    Raises:
        PatchError: The file cannot be read, or is not a context map.
    """
    tensors, metadata = read_safetensors(path)
    if set(tensors) != {_UP, _DOWN}:
        raise PatchError(f"'{path}' is not a context map.")
    context_map = LowRank(*(widened(name, tensors[name], str(path)) for name in (_UP, _DOWN)))
    if context_map.shape[0] != context_map.shape[1]:
        raise PatchError(
            f"'{path}' is not a context map: it maps {context_map.shape[1]} to {context_map.shape[0]} values."
        )
    return context_map, metadata


def expand(
    context_map: LowRank,
    survey: UNetSurvey,
    metadata: Mapping[str, str] | None = None,
    projections: tuple[str, ...] | None = None,
) -> Patch:
    """Expand a context map for one base model: ``up = W · M.up`` and ``down = M.down`` at every site.

    Args:
        context_map: ``M``, ``(d, d)``.
        survey: Survey of the base model; its text states have width ``d``.
        metadata: Metadata of the file, which the patch takes over.
        projections: Projections to change; default: those in ``metadata``, else ``to_k`` and ``to_v``.

    Returns:
        The patch, in fp32 on the CPU.

    Raises:
        PatchError: The model's text states have another width, or a projection is neither ``to_k`` nor ``to_v``.
    """
    if context_map.shape[1] != survey.context_dim:
        raise PatchError(
            f"This edit is for text states of width {context_map.shape[1]}; this model (family {survey.family}) takes "
            f"{survey.context_dim}. Load a model with the text encoder that the edit was made for."
        )
    about = PatchMetadata.from_strings(metadata or {})
    if projections is None:
        projections = about.projections or ("to_k", "to_v")
    if not projections or set(projections) - {"to_k", "to_v"}:
        raise PatchError(f"A context map changes to_k and to_v, not {', '.join(projections) or 'nothing'}.")
    down = context_map.down.detach().float().cpu()
    factors = {}
    for site in survey:
        for which in projections:
            weight = site.projection(which).weight.detach()
            up = weight.float() @ context_map.up.to(weight.device, torch.float32)
            factors[site.key(which)] = LowRank(up.cpu(), down)
    about = dataclasses.replace(about, format=None, projections=projections)
    return Patch(factors, about.to_strings(), context_map)
