"""Summaries for the user: of a fit, of a patch, of its history."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from ..errors import PatchError, listed
from ..formats.contents import Contents
from ..patch.history import HistoryRecord, read_history
from ..patch.metadata import CombinedPart, PatchMetadata, own_entries
from ..patch.patch import Patch
from ..request.concept import KINDS, Concept
from ..request.request import ForgetRequest, strength_warning

__all__ = [
    "base_model_summary",
    "concept_names",
    "contents_summary",
    "fit_summary",
    "history_summary",
    "last_request",
    "patch_summary",
    "surviving_share_summary",
]

_MANY = 12
_LIKE_A_KIND = re.compile(rf"(.*[^\s_].*)\(({'|'.join(KINDS)})\)", re.DOTALL)


def _amount(count: int) -> str:
    size = count / 1024
    return f"{size / 1024:.1f} MB" if size >= 1024 else f"{size:.0f} kB"


def _concept(concept: Concept) -> str:
    instead = f", shown as '{concept.replacement}'" if concept.replacement else ""
    return f"{concept.name} ({concept.kind}){instead}"


def fit_summary(request: ForgetRequest, patch: Patch, seconds: float, title: str, notes: Sequence[str] = ()) -> str:
    """The summary of a fit, as lines."""
    lines = [f"forgotten: {_concept(concept)}" for concept in request.concepts[:_MANY]]
    if (more := len(request.concepts) - _MANY) > 0:
        lines.append(f"forgotten: {more} more")
    if request.preserve:
        lines.append("kept: " + listed(request.preserve, _MANY))
    lines.append(f"method: {title} [{request.method}], preset {request.preset}, strength {request.strength:g}")
    if request.settings:
        lines.append("settings: " + json.dumps(dict(request.settings), ensure_ascii=False))
    size = _amount(patch.nbytes)
    lines.append(f"patch: {len(patch)} weights, rank {patch.rank}, {size}, made in {seconds:.1f} s")
    lines.append(f"base model: {(patch.about.base_model or '')[:12]}")
    if (warning := strength_warning(request.strength)) is not None:
        lines.append(f"warning: {warning}")
    lines += [f"note: {note}" for note in (*_read_as(request), *notes)]
    if patch.about.note:
        lines.append(f"note: {patch.about.note}")
    return "\n".join(lines)


def _read_as(request: ForgetRequest) -> list[str]:
    """How the names were read that end like a concept with its kind, as the tag ``poster_(object)`` does."""
    notes = []
    for concept in request.concepts:
        if (found := _LIKE_A_KIND.fullmatch(concept.name)) is not None:
            other = f"{found[1].rstrip('_ ')} ({found[2]})"
            notes.append(
                f"'{concept.name}' was read as a name, brackets included, of the kind {concept.kind}; the kind is "
                f"stated with a blank before its bracket: '{other}'"
            )
    return notes


def surviving_share_summary(share: tuple[float, str] | None) -> list[str]:
    """How much of the edit the host's weights keep, and a warning below a half; nothing where it is not measured."""
    if share is None:
        return []
    value, dtype = share
    lines = [f"in the host's weights ({dtype}) {100 * value:.1f} % of the edit survives"]
    if value < 0.5:
        lines.append(
            "warning: more than half of the edit is rounded away there: load the model in a wider dtype (float16, "
            "bfloat16 or float32), or raise the strength."
        )
    return lines


def base_model_summary(metadata: Mapping[str, str], own: str) -> str:
    """Whether a patch was made on the model with the hash ``own``."""
    sources = PatchMetadata.from_strings(metadata).sources()
    found = {(source.base_model, source.base_name) for source in sources}
    if len(found) > 1:
        return "its parts were made on different models"
    made_on, name = next(iter(found))
    if made_on is None:
        return "the patch does not say which model it was made on"
    if made_on == own:
        return "it was made on this very model"
    return f"it was made on another model of this kind (or with LoRAs on): {name or 'unknown'} {made_on[:12]}"


def patch_summary(patch: Patch) -> str:
    """What a patch is and what made it, in lines to read."""
    about = patch.about
    shapes = sorted({factor.shape for factor in patch.factors.values()})
    sizes = listed([f"{rows}×{columns}" for rows, columns in shapes], 4)
    lines = [f"patch: {len(patch)} weights of {sizes}, rank {patch.rank}, {_amount(patch.nbytes)}"]
    if not own_entries(patch.metadata):
        lines.append("it says nothing of how it was made: it was not written by Forget Concept")
        return "\n".join(lines)
    lines += _requests(patch)
    if about.family:
        lines.append(
            f"family: {about.family}"
            if about.base_model is None
            else f"made on: {about.base_name or 'unknown'} (family {about.family}), {about.base_model[:12]}"
        )
    if about.text_layer:
        lines.append(f"text states: {about.text_layer}")
    if about.version:
        lines.append(f"made by version {about.version}")
    if about.note:
        lines.append(f"note: {about.note}")
    return "\n".join(lines)


def contents_summary(contents: Contents) -> list[str]:
    """What an adapter file holds, in lines to read, and why it cannot be applied where it cannot."""
    kinds = ", ".join(f"{kind} of {count} layers" for kind, count in contents.kinds.items()) or "no known kind"
    ranks = listed([str(rank) for rank in contents.ranks], 8)
    lines = [f"adapter: {kinds}" + (f", rank {ranks}" if ranks else "") + f", {contents.dtype}"]
    if contents.places:
        lines.append("changes: " + ", ".join(f"{place} ({count})" for place, count in contents.places.items()))
    if contents.unknown:
        lines.append(f"unknown tensors: {listed(contents.unknown, 4)}")
    if contents.why_not is not None:
        lines.append(f"it cannot be applied: {contents.why_not}")
    return lines


def _requests(patch: Patch) -> list[str]:
    try:
        patch.about.check("parts")
        if patch.about.parts is not None and patch.about.history is None:
            return _combined(patch.about.parts)
        return history_summary(read_history(patch.metadata))
    except PatchError as error:
        return [str(error)]


def last_request(patch: Patch) -> str:
    """The request that made a patch, the last of several, as JSON; empty where the patch does not say."""
    try:
        return read_history(patch.metadata).records[-1].request.to_json(indent=2)
    except PatchError:
        return ""


def _combined(parts: Sequence[CombinedPart]) -> list[str]:
    lines = []
    for part in parts:
        try:
            names = ", ".join(concept.name for concept in read_history(part.metadata).concepts)
        except PatchError:
            names = "a patch that does not say what it forgets"
        lines.append(f"part at strength {part.strength:g}: {names}")
    return lines


def history_summary(record: HistoryRecord) -> list[str]:
    """One line for each request, in order."""
    lines = []
    for entry in record.records:
        request = entry.request
        concepts = listed([_concept(concept) for concept in request.concepts], _MANY)
        lines.append(
            f"{entry.number}. forgotten: {concepts}; {request.method}, preset {request.preset}, strength "
            f"{request.strength:g}, seed {request.seed}"
        )
        if changed := dict(request.settings):
            lines.append("   settings: " + json.dumps(changed, ensure_ascii=False))
        if request.preserve:
            lines.append("   kept: " + listed(request.preserve, _MANY))
    merged = [part for part in record.parts if part.merged]
    if merged:
        lines.append("cut to a bounded rank together: none of these can be taken back")
    return lines


def concept_names(metadata: Mapping[str, str]) -> list[str]:
    """What a patch says that it forgets, each concept once; nothing for other programs' files."""
    return list(dict.fromkeys(PatchMetadata.from_strings(metadata).concepts or ()))
