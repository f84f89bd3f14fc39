"""Requests one after the other: which can follow which, and which of them are solved together."""

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
    """Whether requests of this method are solved together: every method that is not trained.

    Raises :class:`RequestError` for an unknown one.
    """
    return not get(method_id).trained


def next_record(parts: Sequence[JointRequests], plan: Plan) -> RequestRecord:
    """The plan's request as the next one of a sequence, with its number and settings.

    Raises:
        RequestError: The request contradicts an earlier one, or cannot be solved together with those of its method.
    """
    before = requests_in_order(parts)
    _refuse_contradictions(before, plan.request)
    settings = json.loads(json.dumps(dataclasses.asdict(plan.settings)))
    new = RequestRecord(before[-1].number + 1 if before else 1, plan.request, settings)
    if not plan.method.trained:
        joint_request([*solved_with(parts, plan.request.method), new])
    return new


def _said(concepts: Iterable[Concept]) -> dict[str, str]:
    """Every way to say the concepts in the templates, and the concept."""
    return {canonical_phrase(t.format(c.name)): c.name for c in concepts for t in ("{}", *templates(c.kind))}


def _refuse_contradictions(before: Sequence[RequestRecord], request: ForgetRequest) -> None:
    wanted, forgotten = _said(request.concepts), {}
    for one in before:
        for concept in one.request.concepts:
            forgotten[canonical_phrase(concept.name)] = (concept, one.number)
    for concept in request.concepts:
        if (found := forgotten.get(canonical_phrase(concept.name))) is not None:
            raise RequestError(
                f"'{concept.name}' is already forgotten, by request {found[1]}: leave it out, or take that one back "
                "first."
            )
        if concept.replacement and (found := forgotten.get(canonical_phrase(concept.replacement))) is not None:
            raise RequestError(
                f"'{concept.replacement}' shall be shown instead of '{concept.name}', and request {found[1]} forgot "
                "it: name something else."
            )
    for one in before:
        for phrase in one.request.preserve:
            if (name := wanted.get(canonical_phrase(phrase))) is not None:
                raise RequestError(
                    f"'{name}' shall be forgotten, and request {one.number} ({one.names}) preserves '{phrase}': take "
                    "that request back first, and ask for it again without."
                )
        for concept in one.request.concepts:
            if concept.replacement and (name := wanted.get(canonical_phrase(concept.replacement))) is not None:
                raise RequestError(
                    f"'{name}' shall be forgotten, and request {one.number} shows it instead of '{concept.name}': take "
                    "that request back first, and ask for it again with something else."
                )
        said = _said(one.request.concepts)
        for phrase in request.preserve:
            if (name := said.get(canonical_phrase(phrase))) is not None:
                raise RequestError(
                    f"The preserve list contains '{phrase}', and request {one.number} forgot '{name}': leave it out, "
                    "or take that request back first."
                )


# -- closed forms -------------------------------------------------------------------------------------------------


def is_joint(part: JointRequests, method_id: str) -> bool:
    """Whether a further request of this method is solved together with this part's."""
    return not part.merged and part.asked[0].request.method == method_id and is_closed_form(method_id)


def solved_with(parts: Sequence[JointRequests], method_id: str) -> tuple[RequestRecord, ...]:
    """The requests that a further one of this closed form is solved together with."""
    return next((part.asked for part in parts if is_joint(part, method_id)), ())


def joint_request(asked: Sequence[RequestRecord]) -> ForgetRequest:
    """One request for all of them, the same whatever their order; raises where they cannot be one."""
    first = min(asked, key=lambda one: one.number)
    for one in asked:
        for name, value in first.settings.items():
            if one.settings.get(name, value) != value:
                raise RequestError(
                    f"The requests of '{first.request.method}' are solved together and need the same settings: "
                    f"'{name}' is {value!r} in request {first.number} and {one.settings.get(name)!r} in this one."
                )
        if one.request.strength != first.request.strength:
            raise RequestError(
                f"The requests of '{first.request.method}' are solved together and need the same strength: it is "
                f"{first.request.strength:g} in request {first.number} and {one.request.strength:g} in this one."
            )
    concepts = sorted(
        (concept for one in asked for concept in one.request.concepts),
        key=lambda concept: (KINDS.index(concept.kind), canonical_phrase(concept.name)),
    )
    preserve = {normalized_phrase(phrase): phrase for one in asked for phrase in sorted(one.request.preserve)}
    return ForgetRequest(
        tuple(concepts),
        tuple(preserve[key] for key in sorted(preserve)),
        first.request.method,
        first.request.preset,
        first.settings,
        first.request.strength,
        min(one.request.seed for one in asked),
    )
