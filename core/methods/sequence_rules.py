"""Rules of a sequence: which request can follow which, and which requests are solved together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence

from ..errors import RequestError
from ..patch.history import JointRequests, RequestRecord, requests_in_order
from ..request.concept import KINDS, Concept, canonical_phrase, normalized_phrase, templates
from ..request.plan import Plan
from ..request.request import ForgetRequest
from .registry import get

__all__ = ["is_closed_form", "is_joint", "joint_request", "next_record", "solved_with"]


def is_closed_form(method_id: str) -> bool:
    """Whether requests of this method are solved together; true for every method that is not trained.

    Raises:
        RequestError: There is no such method.
    """
    return not get(method_id).trained


def next_record(parts: Sequence[JointRequests], plan: Plan) -> RequestRecord:
    """The plan's request as the next one of a sequence, with its number and settings.

    Raises:
        RequestError: The request contradicts an earlier one, or cannot be solved together with those of its method.
    """
    earlier = requests_in_order(parts)
    _refuse_contradictions(earlier, plan.request)
    settings = json.loads(json.dumps(dataclasses.asdict(plan.settings)))
    new = RequestRecord(earlier[-1].number + 1 if earlier else 1, plan.request, settings)
    if not plan.method.trained:
        joint_request([*solved_with(parts, plan.request.method), new])
    return new


def _phrases(concepts: Iterable[Concept]) -> dict[str, str]:
    """Every phrase that names one of the concepts, bare or in a template of its kind, and the concept's name."""
    return {
        canonical_phrase(template.format(concept.name)): concept.name
        for concept in concepts
        for template in ("{}", *templates(concept.kind))
    }


def _refuse_contradictions(earlier: Sequence[RequestRecord], request: ForgetRequest) -> None:
    """Raise where one request forgets what another one preserves, shows as a replacement, or already forgot."""
    forgotten = {
        canonical_phrase(concept.name): record.number for record in earlier for concept in record.request.concepts
    }
    for concept in request.concepts:
        if (number := forgotten.get(canonical_phrase(concept.name))) is not None:
            raise RequestError(
                f"'{concept.name}' is already forgotten, by request {number}: leave it out, or take that request back "
                "first."
            )
        if concept.replacement and (number := forgotten.get(canonical_phrase(concept.replacement))) is not None:
            raise RequestError(
                f"'{concept.replacement}' cannot replace '{concept.name}', because request {number} forgot it: name "
                "another replacement."
            )
    new = _phrases(request.concepts)
    for record in earlier:
        for phrase in record.request.preserve:
            if (name := new.get(canonical_phrase(phrase))) is not None:
                raise RequestError(
                    f"'{name}' cannot be forgotten, because request {record.number} ({record.names}) preserves "
                    f"'{phrase}': take that request back, and make it again without '{phrase}'."
                )
        for concept in record.request.concepts:
            if concept.replacement and (name := new.get(canonical_phrase(concept.replacement))) is not None:
                raise RequestError(
                    f"'{name}' cannot be forgotten, because request {record.number} shows it instead of "
                    f"'{concept.name}': take that request back, and make it again with another replacement."
                )
        old = _phrases(record.request.concepts)
        for phrase in request.preserve:
            if (name := old.get(canonical_phrase(phrase))) is not None:
                raise RequestError(
                    f"The preserve list contains '{phrase}', and request {record.number} forgot '{name}': leave it "
                    "out, or take that request back first."
                )


# -- closed forms -------------------------------------------------------------------------------------------------


def is_joint(part: JointRequests, method_id: str) -> bool:
    """Whether another request of this method is solved together with the requests of ``part``."""
    return not part.merged and part.records[0].request.method == method_id and is_closed_form(method_id)


def solved_with(parts: Sequence[JointRequests], method_id: str) -> tuple[RequestRecord, ...]:
    """The requests that another request of this closed form is solved together with."""
    return next((part.records for part in parts if is_joint(part, method_id)), ())


def joint_request(records: Sequence[RequestRecord]) -> ForgetRequest:
    """One request for all of them, the same in whatever order they are given.

    Raises:
        RequestError: They differ in strength or in a setting.
    """
    first = min(records, key=lambda record: record.number)
    for record in records:
        for name, value in first.settings.items():
            if record.settings.get(name, value) != value:
                raise RequestError(
                    f"The requests of '{first.request.method}' are solved together and need the same settings: "
                    f"'{name}' is {value!r} in request {first.number} and {record.settings.get(name)!r} in this one."
                )
        if record.request.strength != first.request.strength:
            raise RequestError(
                f"The requests of '{first.request.method}' are solved together and need the same strength: it is "
                f"{first.request.strength:g} in request {first.number} and {record.request.strength:g} in this one."
            )
    concepts = sorted(
        (concept for record in records for concept in record.request.concepts),
        key=lambda concept: (KINDS.index(concept.kind), canonical_phrase(concept.name)),
    )
    preserve = {normalized_phrase(phrase): phrase for record in records for phrase in sorted(record.request.preserve)}
    return ForgetRequest(
        tuple(concepts),
        tuple(preserve[key] for key in sorted(preserve)),
        first.request.method,
        first.request.preset,
        first.settings,
        first.request.strength,
        min(record.request.seed for record in records),
    )
