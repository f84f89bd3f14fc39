"""What was done, and what a patch is, as words to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..errors import PatchError, listed
from ..patch.history import HistoryRecord, read_history
from ..patch.patch import Patch
from ..request.concept import Concept
from ..request.request import ForgetRequest

__all__ = [
    "base_model_summary",
    "concept_names",
    "fit_summary",
    "history_summary",
    "last_request",
    "patch_summary",
    "surviving_share_summary",
]

_PREFIX = "forget_concept."
_MANY = 12


def _amount(count: int) -> str:
    size = count / 1024
    return f"{size / 1024:.1f} MB" if size >= 1024 else f"{size:.0f} kB"


def _concept(concept: Concept) -> str:
    instead = f", shown as '{concept.replacement}'" if concept.replacement else ""
    return f"{concept.name} ({concept.kind}){instead}"


def fit_summary(request: ForgetRequest, patch: Patch, seconds: float, title: str, notes: Sequence[str] = ()) -> str:
    """What was done, in lines to read."""
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
    lines.append(f"base model: {patch.metadata.get('forget_concept.base_model', '')[:12]}")
    lines += [f"note: {note}" for note in notes]
    if note := patch.metadata.get("forget_concept.note"):
        lines.append(f"note: {note}")
    return "\n".join(lines)


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
    found = {(part.get(_PREFIX + "base_model"), part.get(_PREFIX + "base_name")) for part in _made_of(metadata)}
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
    about = {key.removeprefix(_PREFIX): text for key, text in patch.metadata.items() if key.startswith(_PREFIX)}
    shapes = sorted({factor.shape for factor in patch.factors.values()})
    sizes = listed([f"{rows}×{columns}" for rows, columns in shapes], 4)
    lines = [f"patch: {len(patch)} weights of {sizes}, rank {patch.rank}, {_amount(patch.nbytes)}"]
    if not about:
        lines.append("it says nothing of how it was made: it was not written by Forget Concept")
        return "\n".join(lines)
    lines += _requests(patch.metadata)
    if family := about.get("family"):
        lines.append(
            f"made on: {about.get('base_name', 'unknown')} (family {family}), {about['base_model'][:12]}"
            if "base_model" in about
            else f"family: {family}"
        )
    if layer := about.get("text_layer"):
        lines.append(f"text states: {layer}")
    if version := about.get("version"):
        lines.append(f"made by version {version}")
    if note := about.get("note"):
        lines.append(f"note: {note}")
    return "\n".join(lines)


def _made_of(metadata: Mapping[str, str]) -> list[Mapping[str, str]]:
    """What the parts of a combined patch say, of parts of these too; of any other patch, what it says itself."""
    if _PREFIX + "parts" not in metadata:
        return [metadata]
    try:
        parts = [dict(part["metadata"]) for part in json.loads(metadata[_PREFIX + "parts"])]
    except (ValueError, KeyError, TypeError):
        return [{}]
    return [each for part in parts for each in _made_of(part)] or [{}]


def _requests(metadata: Mapping[str, str]) -> list[str]:
    if _PREFIX + "parts" in metadata and _PREFIX + "history" not in metadata:
        return _combined(metadata[_PREFIX + "parts"])
    try:
        record = read_history(metadata)
    except PatchError as error:
        return [str(error)]
    return history_summary(record)


def last_request(patch: Patch) -> str:
    """The request that made a patch, the last of several, as JSON; empty where the patch does not say."""
    try:
        return read_history(patch.metadata).asked[-1].request.to_json(indent=2)
    except PatchError:
        return ""


def _combined(text: str) -> list[str]:
    try:
        parts = [(float(part["strength"]), dict(part["metadata"])) for part in json.loads(text)]
    except (ValueError, KeyError, TypeError) as error:
        return [f"it was put together from several patches, and what it says of them cannot be read: {error}"]
    lines = []
    for strength, metadata in parts:
        try:
            names = ", ".join(concept.name for concept in read_history(metadata).concepts)
        except PatchError:
            names = "a patch that does not say what it forgets"
        lines.append(f"part at strength {strength:g}: {names}")
    return lines


def history_summary(record: HistoryRecord) -> list[str]:
    """A line a request, in the order asked."""
    lines = []
    for one in record.asked:
        request = one.request
        concepts = listed([_concept(concept) for concept in request.concepts], _MANY)
        lines.append(
            f"{one.number}. forgotten: {concepts}; {request.method}, preset {request.preset}, strength "
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
    try:
        found = json.loads(metadata.get(_PREFIX + "concepts", "[]"))
    except json.JSONDecodeError:
        found = []
    return list(dict.fromkeys(str(name) for name in found)) if isinstance(found, list) else []
