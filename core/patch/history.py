"""The record in a patch's metadata of the requests that made it: their order, and which ranks belong to which.

The record is one JSON document in the metadata. It is read without a model and without the methods; solving and
training a sequence is in :mod:`..methods.sequence`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import PatchError, RequestError
from ..request.concept import Concept, normalized_phrase
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

_SCHEMA = 1


@dataclass(frozen=True)
class RequestRecord:
    """One request of a sequence.

    Args:
        number: Position in the sequence, from 1; it does not change when other requests are taken back.
        request: The request.
        settings: All settings of its method, resolved, as JSON values.
        version: Version of this package that fitted it.
    """

    number: int
    request: ForgetRequest
    settings: Mapping[str, Any]
    version: str = VERSION

    @property
    def names(self) -> str:
        """The names of its concepts, quoted, for a sentence."""
        return " and ".join(f"'{concept.name}'" for concept in self.request.concepts)


class JointRequests(Protocol):
    """Requests that made one change together; ``merged`` if the changes can no longer be separated."""

    @property
    def records(self) -> tuple[RequestRecord, ...]: ...

    @property
    def merged(self) -> bool: ...


def requests_in_order(parts: Sequence[JointRequests]) -> tuple[RequestRecord, ...]:
    """The records of all parts, by number."""
    return tuple(sorted((record for part in parts for record in part.records), key=lambda record: record.number))


@dataclass(frozen=True)
class HistoryRecordPart:
    """One part of a sequence as its record describes it.

    Args:
        merged: Whether the part was truncated to a rank, so that its requests cannot be separated.
        ranks: Rank of the part by projection (``"to_k"``); by full layer key where a layer differs.
        about: What the method states about the part.
        records: Its requests.
    """

    merged: bool
    ranks: Mapping[str, int]
    about: PatchMetadata
    records: tuple[RequestRecord, ...]

    def rank_at(self, key: str) -> int:
        """Rank of the part at one layer; 0 where it changes nothing there."""
        return self.ranks.get(key, self.ranks.get(key.rpartition(".")[2], 0))


@dataclass(frozen=True)
class HistoryRecord:
    """The whole record: a sequence without its factors.

    Args:
        parts: Its parts, in the order in which their factors are concatenated.
        max_rank: Bound of the rank of the whole patch, if one is set.
    """

    parts: tuple[HistoryRecordPart, ...]
    max_rank: int | None

    @property
    def records(self) -> tuple[RequestRecord, ...]:
        """Every request, by number."""
        return requests_in_order(self.parts)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """Every forgotten concept, in the order of the requests."""
        return tuple(concept for record in self.records for concept in record.request.concepts)


def read_history(metadata: Mapping[str, str]) -> HistoryRecord:
    """Read the record in a patch's metadata. For a patch of a single request, it is derived from the other entries.

    Raises:
        PatchError: The metadata have no record, or it cannot be read.
    """
    about = PatchMetadata.from_strings(metadata)
    try:
        about.check("history", "request", "settings")
        if about.history is not None:
            return _record_of(about.history)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PatchError(f"The record of this patch's requests cannot be read: {error}") from error
    if about.request is not None:
        record = RequestRecord(1, about.request, about.settings or {}, about.version or VERSION)
        return HistoryRecord((HistoryRecordPart(False, {}, about.of_method(), (record,)),), None)
    if about.parts is not None or "parts" in about.malformed:
        raise PatchError(
            "This patch was put together from several patches without a record of which ranks belong to which: it "
            "cannot be continued, and no request can be taken back. Use the single patches instead."
        )
    raise PatchError(
        "This patch does not say which requests made it: it cannot be continued, and no request can be taken back."
    )


def _record_of(document: Mapping[str, Any]) -> HistoryRecord:
    """The record in a JSON document; raises what indexing and conversion raise where it is malformed."""
    if document["schema"] != _SCHEMA:
        raise PatchError(f"it has schema {document['schema']!r}, and this version reads schema {_SCHEMA}.")
    parts = []
    for part in document["parts"]:
        records = tuple(
            RequestRecord(
                int(entry["number"]),
                ForgetRequest.from_json(json.dumps(entry["request"])),
                dict(entry["settings"]),
                str(entry["version"]),
            )
            for entry in part["requests"]
        )
        if not records:
            raise PatchError("it has a part without a request.")
        ranks = {str(key): int(rank) for key, rank in part["ranks"].items()}
        about = PatchMetadata.from_entries({str(key): str(text) for key, text in part["about"].items()})
        parts.append(HistoryRecordPart(bool(part["merged"]), ranks, about, records))
    if not parts:
        raise PatchError("it has no request.")
    numbers = [record.number for part in parts for record in part.records]
    if len(set(numbers)) < len(numbers):
        raise PatchError("it has a request number twice.")
    max_rank = document["max_rank"]
    return HistoryRecord(tuple(parts), None if max_rank is None else int(max_rank))


class _PatchPart(JointRequests, Protocol):
    @property
    def patch(self) -> Patch: ...


def history_to_dict(parts: Sequence[_PatchPart], whole: Patch, max_rank: int | None) -> dict[str, Any]:
    """The record of ``parts`` as the JSON document that :func:`read_history` reads.

    Args:
        parts: The parts with their patches.
        whole: Their sum.
        max_rank: Bound of the rank of ``whole``, if one is set.
    """
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
                        "number": record.number,
                        "request": json.loads(record.request.to_json()),
                        "settings": dict(record.settings),
                        "version": record.version,
                    }
                    for record in part.records
                ],
            }
            for part in parts
        ],
    }


def _ranks_of(whole: Patch, part: Patch) -> dict[str, int]:
    """Rank of a part at every layer of the whole patch: the most common one by projection, and the exceptions."""
    ranks = {key: part.factors[key].rank if key in part.factors else 0 for key in whole.factors}
    usual: dict[str, int] = {}
    for projection in dict.fromkeys(key.rpartition(".")[2] for key in ranks):
        counts = Counter(rank for key, rank in ranks.items() if key.rpartition(".")[2] == projection)
        usual[projection] = counts.most_common(1)[0][0]
    return usual | {key: rank for key, rank in ranks.items() if rank != usual[key.rpartition(".")[2]]}


def requests_to_restore(text: str, records: Sequence[RequestRecord]) -> list[int | str]:
    """Parse which requests to take back: names of concepts, or numbers of requests (``2`` or ``#2``).

    Args:
        text: A list, separated by commas or lines.
        records: The requests of the patch; a concept whose name is a number is found by its name.

    Raises:
        RequestError: The list is empty.
    """
    names = {normalized_phrase(concept.name) for record in records for concept in record.request.concepts}
    wanted: list[int | str] = []
    for entry in split_list(text):
        number = re.fullmatch(r"#?\s*(\d{1,6})", entry)
        wanted.append(int(number[1]) if number and normalized_phrase(entry) not in names else entry)
    if not wanted:
        raise RequestError("Nothing is named to be taken back: write a concept, or the number of its request.")
    return wanted
