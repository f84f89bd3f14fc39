"""The record that travels in a patch's metadata: which requests made it, in which order, and which rank is whose."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import PatchError, RequestError
from ..request.concept import Concept
from ..request.parsing import split_list
from ..request.request import ForgetRequest
from ..version import VERSION
from .metadata import PatchMetadata, own_entries
from .patch import Patch

__all__ = [
    "HistoryRecord",
    "HistoryRecordPart",
    "JointRequests",
    "RequestRecord",
    "history_to_dict",
    "read_history",
    "requests_in_order",
    "requests_to_restore",
]


@dataclass(frozen=True)
class RequestRecord:
    """A request of a history: its ``number`` (from 1, in the order asked; it stays when others are taken back), the
    request, the settings its preset and overrides came to, and the version that took it in."""

    number: int
    request: ForgetRequest
    settings: Mapping[str, Any]
    version: str = VERSION

    @property
    def names(self) -> str:
        return " and ".join(f"'{concept.name}'" for concept in self.request.concepts)


class JointRequests(Protocol):
    """Requests that made one change; ``merged`` where changes can no longer be told apart."""

    @property
    def asked(self) -> tuple[RequestRecord, ...]: ...

    @property
    def merged(self) -> bool: ...


def requests_in_order(parts: Sequence[JointRequests]) -> tuple[RequestRecord, ...]:
    """Every request in the order asked."""
    return tuple(sorted((one for part in parts for one in part.asked), key=lambda one: one.number))


_SCHEMA = 1


@dataclass(frozen=True)
class HistoryRecordPart:
    """A part as the record has it: its requests, and its rank by projection or, before that, by layer."""

    merged: bool
    ranks: Mapping[str, int]
    about: PatchMetadata
    asked: tuple[RequestRecord, ...]

    def rank_at(self, key: str) -> int:
        return self.ranks.get(key, self.ranks.get(key.rpartition(".")[2], 0))


@dataclass(frozen=True)
class HistoryRecord:
    """What a patch's metadata say of the requests that made it: a :class:`History` without its factors."""

    parts: tuple[HistoryRecordPart, ...]
    max_rank: int | None

    @property
    def asked(self) -> tuple[RequestRecord, ...]:
        """Every request in the order asked."""
        return requests_in_order(self.parts)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """Everything that is forgotten, in the order asked."""
        return tuple(concept for one in self.asked for concept in one.request.concepts)


def read_history(metadata: Mapping[str, str]) -> HistoryRecord:
    """The record in a patch's metadata; that of a patch of one request is made up from what it says of itself.

    Raises :class:`PatchError` where there is none.
    """
    about = PatchMetadata.from_strings(metadata)
    try:
        about.check("history", "request", "settings")
        if about.history is not None:
            return _parsed(about.history)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PatchError(f"The record of this patch's requests cannot be read: {error}") from error
    if about.request is not None:
        asked = RequestRecord(1, about.request, about.settings or {}, about.version or VERSION)
        return HistoryRecord((HistoryRecordPart(False, {}, about.of_method(), (asked,)),), None)
    if about.parts is not None or "parts" in about.malformed:
        raise PatchError(
            "This patch was put together from several ones, and nothing says which part of it is whose: it cannot be "
            "continued, nor anything taken back."
        )
    raise PatchError(
        "This patch does not say which requests made it, so it cannot be continued, nor anything taken back."
    )


def _parsed(data: Any) -> HistoryRecord:
    if data["schema"] != _SCHEMA:
        raise PatchError(f"it has schema {data['schema']!r}, and this version reads schema {_SCHEMA}.")
    parts = []
    for part in data["parts"]:
        asked = tuple(
            RequestRecord(
                int(one["number"]),
                ForgetRequest.from_json(json.dumps(one["request"])),
                dict(one["settings"]),
                str(one["version"]),
            )
            for one in part["requests"]
        )
        if not asked:
            raise PatchError("it has a part without a request.")
        ranks = {str(key): int(rank) for key, rank in part["ranks"].items()}
        about = PatchMetadata.from_entries({str(key): str(text) for key, text in part["about"].items()})
        parts.append(HistoryRecordPart(bool(part["merged"]), ranks, about, asked))
    if not parts:
        raise PatchError("it has no request.")
    numbers = [one.number for part in parts for one in part.asked]
    if len(set(numbers)) < len(numbers):
        raise PatchError("it has a request number twice.")
    return HistoryRecord(tuple(parts), None if data["max_rank"] is None else int(data["max_rank"]))


def _ranks_of(whole: Patch, part: Patch) -> dict[str, int]:
    """The part's rank at every layer of the whole patch: by projection, and by layer where one differs from most."""
    ranks = {key: part.factors[key].rank if key in part.factors else 0 for key in whole.factors}
    usual: dict[str, int] = {}
    for which in dict.fromkeys(key.rpartition(".")[2] for key in ranks):
        found = Counter(rank for key, rank in ranks.items() if key.rpartition(".")[2] == which)
        usual[which] = found.most_common(1)[0][0]
    return usual | {key: rank for key, rank in ranks.items() if rank != usual[key.rpartition(".")[2]]}


class _Patched(JointRequests, Protocol):
    @property
    def patch(self) -> Patch: ...


def history_to_dict(parts: Sequence[_Patched], whole: Patch, max_rank: int | None) -> dict[str, Any]:
    """The record of these parts, whose sum is ``whole``, as :func:`read_history` finds it."""
    return {
        "schema": _SCHEMA,
        "max_rank": max_rank,
        "parts": [
            {
                "merged": part.merged,
                "ranks": _ranks_of(whole, part.patch),
                "about": own_entries(part.patch.about.of_method().to_strings()),
                "requests": [
                    {
                        "number": one.number,
                        "request": json.loads(one.request.to_json()),
                        "settings": dict(one.settings),
                        "version": one.version,
                    }
                    for one in part.asked
                ],
            }
            for part in parts
        ],
    }


def requests_to_restore(text: str, asked: Sequence[RequestRecord]) -> list[int | str]:
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
