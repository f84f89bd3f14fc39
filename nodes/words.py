"""A node's text boxes as a request, and what was done as words to read: no host in it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.concepts import Concept, ForgetRequest
from ..core.errors import ForgetConceptError, PatchError, RequestError, listed
from ..core.patch import Patch
from ..core.progress import ProgressEvent
from ..core.record import Record, read_record
from ..core.requested import Asked

__all__ = [
    "Story",
    "about_patch",
    "base_words",
    "concepts_in",
    "fresh_file",
    "history_words",
    "last_request",
    "patch_name",
    "report",
    "request_from_words",
    "share_words",
    "split_list",
    "takes_back",
]

_PREFIX = "forget_concept."
# commas of Latin, Chinese, Japanese and Arabic script
_BETWEEN = re.compile("[,\uff0c\u3001\u060c\\r\\n]")
# direction marks and the mark of byte order, which a copied word brings along unseen
_UNSEEN = "\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
_MANY = 12


def split_list(text: str) -> list[str]:
    """The entries of a box: separated by commas or lines, without blanks around them; empty ones are left out."""
    entries = [entry.strip().strip(_UNSEEN).strip() for entry in _BETWEEN.split(text or "")]
    return [entry for entry in entries if entry]


def _replacements(text: str, count: int) -> list[str | None]:
    found = split_list(text)
    if not found:
        return [None] * count
    if len(found) == 1:
        return [found[0]] * count
    if len(found) != count:
        raise RequestError(
            f"There are {count} concepts and {len(found)} replacements: give none, one for all of them, or one for "
            "each in the same order."
        )
    return list(found)


def _settings(text: str) -> dict[str, Any]:
    if not (text or "").strip():
        return {}
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RequestError(f'The settings are not JSON like {{"rank": 8}}: {error}.') from error
    if not isinstance(value, dict):
        raise RequestError('The settings must be a JSON object like {"rank": 8}.')
    return value


def request_from_words(
    concept: str,
    kind: str = "object",
    replacement: str = "",
    preserve: str = "",
    method: str = "uce",
    preset: str = "tuned",
    strength: float = 1.0,
    seed: int = 0,
    settings: str = "",
) -> ForgetRequest:
    """The checked request that a node's boxes ask for.

    ``concept``, ``replacement`` and ``preserve`` are lists by commas or lines; ``settings`` is a JSON object. Raises
    :class:`RequestError` in words.
    """
    names = split_list(concept)
    if not names:
        raise RequestError("The concept is empty: write what is to be forgotten.")
    concepts = tuple(
        Concept(name, kind, instead)
        for name, instead in zip(names, _replacements(replacement, len(names)), strict=True)
    )
    request = ForgetRequest(
        concepts, tuple(split_list(preserve)), method, preset, _settings(settings), float(strength), int(seed)
    )
    request.check()
    return request


def _amount(count: int) -> str:
    size = count / 1024
    return f"{size / 1024:.1f} MB" if size >= 1024 else f"{size:.0f} kB"


def _concept(concept: Concept) -> str:
    instead = f", shown as '{concept.replacement}'" if concept.replacement else ""
    return f"{concept.name} ({concept.kind}){instead}"


def report(request: ForgetRequest, patch: Patch, seconds: float, title: str, notes: Sequence[str] = ()) -> str:
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


def share_words(share: tuple[float, str] | None) -> list[str]:
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


def base_words(metadata: Mapping[str, str], own: str) -> str:
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


def about_patch(patch: Patch) -> str:
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
        record = read_record(metadata)
    except PatchError as error:
        return [str(error)]
    return history_words(record)


def last_request(patch: Patch) -> str:
    """The request that made a patch, the last of several, as JSON; empty where the patch does not say."""
    try:
        return read_record(patch.metadata).asked[-1].request.to_json(indent=2)
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
            names = ", ".join(concept.name for concept in read_record(metadata).concepts)
        except PatchError:
            names = "a patch that does not say what it forgets"
        lines.append(f"part at strength {strength:g}: {names}")
    return lines


def history_words(record: Record) -> list[str]:
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


def takes_back(text: str, asked: Sequence[Asked]) -> list[int | str]:
    """What a person wants taken back: names of concepts, or numbers of requests (``2`` or ``#2``).

    Raises :class:`RequestError` where nothing is said.
    """
    names = {concept.name.casefold() for one in asked for concept in one.request.concepts}
    found: list[int | str] = []
    for entry in split_list(text):
        number = re.fullmatch(r"#?\s*(\d{1,6})", entry)
        found.append(int(number[1]) if number and entry.casefold() not in names else entry)
    if not found:
        raise RequestError("Nothing is named to be taken back: write a concept, or the number of its request.")
    return found


def _time(seconds: float) -> str:
    whole = max(int(seconds + 0.5), 0)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class Story:
    """Long work as a line of text at a time: what is done, which step, the loss, how long it will take."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._message: str | None = None
        self._first = (0, 0.0)

    def line(self, event: ProgressEvent) -> str:
        now = self._clock()
        if event.message != self._message or event.step < self._first[0]:
            self._message, self._first = event.message, (event.step, now)
        parts = [f"{event.message or 'working'} {event.step}/{event.total}"]
        if event.loss is not None:
            parts.append(f"loss {event.loss:.4g}")
        done, taken = event.step - self._first[0], now - self._first[1]
        if done > 0 and event.step < event.total:
            parts.append(f"{_time(taken / done * (event.total - event.step))} left")
        return ", ".join(parts)


_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_LONGEST = 120


def patch_name(prefix: str, concepts: Sequence[str], root: str = "the LoRA folder") -> tuple[str, ...]:
    """A file's folders and its name without number and ending, from what a person wrote; ``%concept%`` is filled in.

    ``root`` says in words where they are to lie.

    Raises :class:`RequestError` for a place outside of the folder, and for names that not every system can have.
    """
    slug = re.sub(r"[^\w]+", "-", "-".join(concepts[:3]).casefold()).strip("-_")[:60] or "concept"
    if len(concepts) > 3:
        slug += f"-and-{len(concepts) - 3}-more"
    parts = [part.strip() for part in re.split(r"[/\\]", (prefix or "").replace("%concept%", slug))]
    if not "".join(parts):
        raise RequestError("The file has no name: write one, such as forget/%concept%.")
    if ".." in parts or "." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", prefix.strip()):
        raise RequestError(
            f"'{prefix}' is no place in {root}: write a name, or folders and a name, without '..' and without a slash "
            "before it."
        )
    for part in parts:
        if not part or _FORBIDDEN.search(part) or _RESERVED.fullmatch(part) or part.endswith("."):
            raise RequestError(
                f"'{part}' cannot be part of a file's name on every system: leave out empty parts, a dot at the end "
                'and the characters < > : " | ? *.'
            )
        if len(part.encode()) > _LONGEST:
            raise RequestError(f"The name '{part[:40]}…' is too long: {_LONGEST} bytes at most.")
    return tuple(parts)


def concepts_in(metadata: Mapping[str, str]) -> list[str]:
    """What a patch says that it forgets, each concept once; nothing for other programs' files."""
    try:
        found = json.loads(metadata.get(_PREFIX + "concepts", "[]"))
    except json.JSONDecodeError:
        found = []
    return list(dict.fromkeys(str(name) for name in found)) if isinstance(found, list) else []


def fresh_file(folder: Path, stem: str, suffix: str) -> Path:
    """The file with the first number behind ``stem`` that no file has there, whatever its ending.

    Raises :class:`ForgetConceptError` where the folder cannot be read.
    """
    try:
        taken = {path.name.casefold() for path in folder.iterdir()}
    except OSError as error:
        raise ForgetConceptError(f"The folder '{folder}' cannot be read: {error.strerror or error}.") from error
    number = 1
    while any(name.startswith(f"{stem}_{number:05}.".casefold()) for name in taken):
        number += 1
    return folder / f"{stem}_{number:05}{suffix}"
