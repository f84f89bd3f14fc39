"""Context maps as a file, and their expansion into a patch for one base model.

A closed form that solves once for every layer that reads a stream of text states gives ``ΔW = W M`` at each of them, so
the edit is the linear map ``c ↦ (I + M) c`` of the text states. The two factors of ``M`` fit every checkpoint with the
same text encoder. There is one map a stream.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import torch
from torch.nn import functional

from ..errors import PatchError, listed
from ..files.safetensors_io import read_safetensors, widened, write_safetensors
from ..models.model_survey import TEXT_PROJECTIONS, ModelSurvey
from ..models.text_entries import TOKENS
from ..patch.low_rank import LowRank
from ..patch.metadata import PatchMetadata
from ..patch.outlets import saves_as
from ..patch.patch import Patch

__all__ = ["FORMAT", "expand", "load", "save"]

FORMAT = "context_map"
_UP, _DOWN = ".up", ".down"


def _name(stream: str) -> str:
    """Name of a stream's map in a file; that of the tokens is the oldest, and has no stream in it."""
    return FORMAT if stream == TOKENS else f"{FORMAT}.{stream}"


@saves_as("context-map")
def save(
    patch: Patch,
    path: str | os.PathLike[str],
    survey: ModelSurvey | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the context maps of a patch.

    Raises:
        PatchError: The patch has no context map, or the file cannot be written.
    """
    if not patch.context_maps:
        raise PatchError("This patch has no context map: only a closed form with one solve for all sites has one.")
    tensors: dict[str, torch.Tensor] = {}
    for stream, one in patch.context_maps.items():
        tensors |= {_name(stream) + _UP: one.up.to(dtype), _name(stream) + _DOWN: one.down.to(dtype)}
    write_safetensors(tensors, path, {**patch.metadata, **PatchMetadata(format=FORMAT).to_strings()})


def load(path: str | os.PathLike[str]) -> tuple[dict[str, LowRank], dict[str, str]]:
    """Read context maps by stream, and their metadata.

    Raises:
        PatchError: The file cannot be read, or is not a context map.
    """
    tensors, metadata = read_safetensors(path)
    names = {name.removesuffix(_UP).removesuffix(_DOWN) for name in tensors}
    pairs = {name + part for name in names for part in (_UP, _DOWN)}
    known = all(name == FORMAT or name.startswith(FORMAT + ".") for name in names)
    if not names or set(tensors) != pairs or not known:
        raise PatchError(f"'{path}' is not a context map.")
    maps = {}
    for name in sorted(names):
        one = LowRank(*(widened(name + part, tensors[name + part], str(path)) for part in (_UP, _DOWN)))
        if one.shape[0] != one.shape[1]:
            raise PatchError(f"'{path}' is not a context map: it maps {one.shape[1]} to {one.shape[0]} values.")
        maps[TOKENS if name == FORMAT else name.removeprefix(FORMAT + ".")] = one
    return maps, metadata


def expand(
    context_maps: Mapping[str, LowRank],
    survey: ModelSurvey,
    metadata: Mapping[str, str] | None = None,
    projections: tuple[str, ...] | None = None,
) -> Patch:
    """Expand context maps for one base model: ``up = W · M.up`` and ``down = M.down`` at every layer that reads text.

    Args:
        context_maps: ``M``, ``(d, d)``, by stream.
        survey: Survey of the base model, which reads every one of these streams with its width ``d``.
        metadata: Metadata of the file, which the patch takes over.
        projections: Projections of a UNet's cross-attention to change; default: those in ``metadata``, else ``to_k``
            and ``to_v``.

    Returns:
        The patch, in fp32 on the CPU.

    Raises:
        PatchError: The model does not read a stream, or reads states of another width, or a projection is neither
            ``to_k`` nor ``to_v``.
    """
    for stream, one in context_maps.items():
        width = survey.width(stream)
        if width is None:
            raise PatchError(
                f"This edit also changes what a model reads from '{stream}' text states, and this model (family "
                f"{survey.family}) reads none. Load a model with the text encoders that the edit was made for."
            )
        if one.shape[1] != width:
            raise PatchError(
                f"This edit is for text states of width {one.shape[1]}; this model (family {survey.family}) takes "
                f"{width}. Load a model with the text encoder that the edit was made for."
            )
    about = PatchMetadata.from_strings(metadata or {})
    if projections is None:
        projections = about.projections or TEXT_PROJECTIONS
    if not projections or set(projections) - set(TEXT_PROJECTIONS):
        raise PatchError(f"A context map changes to_k and to_v, not {listed(projections) or 'nothing'}.")
    factors = {}
    for stream, one in context_maps.items():
        for entry in survey.edited(stream, projections):
            up = entry.weight.float() @ one.up.to(entry.weight.device, torch.float32)
            after = entry.module.weight.shape[1] - entry.start - entry.width
            down = functional.pad(one.down.detach().float().cpu(), (entry.start, after))
            factors[entry.key] = LowRank(up.cpu(), down)
    about = dataclasses.replace(about, format=None, projections=projections)
    return Patch(factors, about.to_strings(), context_maps)
