"""A sequence of requests on one base model: one after the other, each on what the earlier ones left, any taken back.

A :class:`History` holds what was asked, in which order, and the change that each request made to the *base* weights.
Its patch is their sum, the factors side by side, and the record of requests travels in the patch's metadata, so that a
file can be read back and continued, or one request taken out of it.

Drift that compounds from request to request is what destroys continual unlearning (arXiv 2511.07970), so everything is
anchored to the base:

- **Closed forms** are solved again for all of their requests together: the sequence is the joint solve, whatever the
  order, bit for bit, and to take one out is to solve for the others. So they share their settings and strength.
- **Trained methods** give each request its own part, trained with the earlier parts on (``inputs.earlier``); what is
  kept is kept as the base has it. To take one out is to leave its part away; later parts stay as they were trained
  beside it.

A bound of the whole rank (``max_rank``) cuts the sum to the nearest change of that rank. The parts cannot be told apart
from then on, and the record says so.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .concepts import KINDS, Concept, ForgetRequest, bare, normalised, templates
from .diffusion import LatentDiffusion
from .errors import PatchError, RequestError, listed
from .methods import Inputs, fit, get, resolve_settings
from .patch import LowRank, Patch
from .progress import Progress
from .version import VERSION

__all__ = ["RECORD", "Asked", "History", "Part", "Record", "RecordedPart", "is_closed_form", "read_record"]

RECORD = "forget_concept.history"
_SCHEMA = 1
_PREFIX = "forget_concept."
# what all parts of a history share, and what is said of one request alone
_BASE = ("base_model", "base_name", "family", "architecture", "text_layer")
_OF_ONE = ("method", "preset", "settings", "request", "concepts", "strength", "seed")


@dataclass(frozen=True)
class Asked:
    """A request of a history: its ``number`` (from 1, in the order asked; it stays when others are taken back), the
    request, the settings its preset and overrides came to, and the version that took it in."""

    number: int
    request: ForgetRequest
    settings: Mapping[str, Any]
    version: str = VERSION

    @property
    def names(self) -> str:
        return " and ".join(f"'{concept.name}'" for concept in self.request.concepts)


@dataclass(frozen=True)
class Part:
    """What one trained request, all requests of one closed form, or a ``merged`` sum that was cut changed."""

    patch: Patch
    asked: tuple[Asked, ...]
    merged: bool = False


def is_closed_form(method_id: str) -> bool:
    """Whether requests of this method are solved together: every method that is not trained.

    Raises :class:`RequestError` for an unknown one.
    """
    return not get(method_id).trained


@dataclass(frozen=True)
class History:
    """Requests forgotten one after the other; immutable, like everything it holds."""

    parts: tuple[Part, ...] = ()
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank < 1:
            raise RequestError(f"The rank of a whole patch must be at least 1, not {self.max_rank}.")

    # -- what is in it -------------------------------------------------------------------------------------------

    @property
    def asked(self) -> tuple[Asked, ...]:
        """Every request in the order asked."""
        return _in_order(self.parts)

    @property
    def requests(self) -> tuple[ForgetRequest, ...]:
        """Every request in the order asked."""
        return tuple(one.request for one in self.asked)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """Everything that is forgotten, in the order asked."""
        return tuple(concept for request in self.requests for concept in request.concepts)

    @property
    def patch(self) -> Patch:
        """The sum of all parts with the record in its metadata. Raises :class:`PatchError` where there is none."""
        if not self.parts:
            raise PatchError("Nothing is forgotten in this history, so there is no patch.")
        whole = Patch.combined([(part.patch, 1.0) for part in self.parts])
        asked = self.asked
        first = self.parts[0].patch.metadata
        about = {key: first[_PREFIX + key] for key in _BASE if _PREFIX + key in first}
        about |= _alike([_about(part.patch) for part in self.parts])
        about["version"] = VERSION
        about["method"] = " + ".join(dict.fromkeys(one.request.method for one in asked))
        about["concepts"] = json.dumps([concept.name for concept in self.concepts], ensure_ascii=False)
        if len(asked) == 1:
            about |= _of_one(asked[0])
        about["history"] = json.dumps(self._record(whole), ensure_ascii=False)
        return replace(whole, metadata={_PREFIX + key: text for key, text in about.items()})

    # -- from and to a file --------------------------------------------------------------------------------------

    @classmethod
    def from_patch(cls, patch: Patch) -> History:
        """The history that a patch was made by, as its metadata say; a patch of one request is a history of one.

        Raises :class:`PatchError` where they do not say it, or where they no longer fit the factors.
        """
        record = read_record(patch.metadata)
        base = {key: text for key in _BASE if (text := patch.metadata.get(_PREFIX + key)) is not None}
        if "base_model" not in base:
            raise PatchError("This patch does not say which model it was made on, so it cannot be continued.")
        if len(record.parts) == 1:
            return cls((replace(record.parts[0].part(patch, base)),), record.max_rank)
        taken = dict.fromkeys(patch.factors, 0)
        parts = []
        for one in record.parts:
            factors = {}
            for key, factor in patch.factors.items():
                start, rank = taken[key], one.rank_at(key)
                taken[key] += rank
                if rank and taken[key] <= factor.rank:
                    columns = slice(start, taken[key])
                    factors[key] = LowRank(factor.up[:, columns].clone(), factor.down[columns].clone())
            if not factors:
                break
            parts.append(one.part(Patch(factors), base))
        if len(parts) < len(record.parts) or any(taken[key] != f.rank for key, f in patch.factors.items()):
            raise PatchError(
                "This patch no longer is what its record says: another program has changed its ranks since, so its "
                "requests cannot be told apart."
            )
        return cls(tuple(parts), record.max_rank)

    def _record(self, whole: Patch) -> dict[str, Any]:
        return {
            "schema": _SCHEMA,
            "max_rank": self.max_rank,
            "parts": [
                {
                    "merged": part.merged,
                    "ranks": _ranks(whole, part.patch),
                    "about": _about(part.patch),
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
                for part in self.parts
            ],
        }

    # -- forgetting ----------------------------------------------------------------------------------------------

    def check(self, request: ForgetRequest) -> None:
        """Raise :class:`RequestError`, in words, where ``request`` cannot follow the ones before it."""
        _next(self.parts, request)

    def forget(
        self,
        model: LatentDiffusion,
        request: ForgetRequest,
        progress: Progress | None = None,
        inputs: Inputs | None = None,
    ) -> History:
        """The history with ``request`` forgotten too, on the same base model.

        Raises :class:`RequestError` as :meth:`check`, :class:`PatchError` for another base model, and as
        :func:`.methods.fit`.
        """
        new = _next(self.parts, request)
        self.check_base(model)
        inputs = _without_earlier(inputs)
        if is_closed_form(request.method):
            together = (*_solved_with(self.parts, request.method), new)
            return self._with(_solved(model, together, progress, inputs))
        earlier = self.patch if self.parts else None
        patch = fit(model, request, progress, replace(inputs, earlier=earlier))
        return self._with(Part(patch, (_recorded(new),)))

    def check_base(self, model: LatentDiffusion) -> None:
        """Raise :class:`PatchError` unless the history was made on this model and on these text states."""
        if not self.parts:
            return
        said = self.parts[0].patch.metadata
        if said[_PREFIX + "base_model"] != model.model_hash:
            name = said.get(_PREFIX + "base_name", "another one")
            raise PatchError(
                f"This patch was made on another base model ('{name}') than '{model.name}': a sequence of requests "
                "goes on where it began; load that model, or start a new patch for this one."
            )
        layer, here = said.get(_PREFIX + "text_layer"), str(getattr(model.text, "layer", "unknown"))
        if layer is not None and layer != here:
            raise PatchError(
                f"This patch was made with other text states ({layer}) than the model gives now ({here}): load the "
                "model with the same clip skip."
            )

    def _with(self, new: Part) -> History:
        """With a new part, in place of the joint one it solves anew, if there is one."""
        joint = [_is_joint(part, new.asked[0].request.method) for part in self.parts]
        if is_closed_form(new.asked[0].request.method) and any(joint):
            parts = tuple(new if same else part for part, same in zip(self.parts, joint, strict=True))
        else:
            parts = (*self.parts, new)
        return replace(self, parts=parts).bounded(self.max_rank)

    def bounded(self, max_rank: int | None) -> History:
        """The same with a bound of the whole rank; above it the sum is cut to the nearest change of that rank.

        Several parts become one then, and none of their requests can be taken back any more. (A single part stays what
        it is: a closed form can still be solved again.)
        """
        found = replace(self, max_rank=max_rank)
        if max_rank is None or not self.parts:
            return found
        whole = self.patch
        if whole.rank <= max_rank:
            return found
        cut = whole.truncated(max_rank)
        if len(self.parts) == 1:
            # what the part itself says stays
            one = self.parts[0]
            return replace(found, parts=(replace(one, patch=replace(cut, metadata=one.patch.metadata)),))
        return replace(found, parts=(Part(cut, self.asked, merged=True),))

    # -- taking back ---------------------------------------------------------------------------------------------

    def without(
        self,
        which: int | str,
        model: LatentDiffusion | None = None,
        progress: Progress | None = None,
        inputs: Inputs | None = None,
    ) -> History:
        """The history with one request taken back: by its number, or by the name of a concept.

        ``model`` is needed where :meth:`solves_anew`. A concept that was asked for beside others can be taken back
        alone from a closed form, and not from a trained part. Raises :class:`RequestError` where it is not there, where
        it cannot be told apart, or without a model that is needed, and :class:`PatchError` for another base model.
        """
        part, asked, left = self._found(which)
        kept = tuple(one for was in part.asked if (one := left if was is asked else was) is not None)
        others = tuple(other for other in self.parts if other is not part)
        if not kept:
            return replace(self, parts=others)
        if model is None:
            raise RequestError(
                f"The requests of '{asked.request.method}' were solved together: to take {asked.names} back, the "
                "others are solved again, and that needs the base model."
            )
        self.check_base(model)
        solved = _solved(model, kept, progress, _without_earlier(inputs))
        parts = tuple(solved if other is part else other for other in self.parts)
        return replace(self, parts=parts).bounded(self.max_rank)

    def solves_anew(self, which: int | str) -> bool:
        """Whether taking this back means to solve a closed form again. Raises :class:`RequestError` as ``without``."""
        part, _, left = self._found(which)
        return len(part.asked) > 1 or left is not None

    def trained_on(self, which: int | str) -> tuple[Asked, ...]:
        """The later requests that were trained with this one's change on; raises as ``without``."""
        _, asked, _ = self._found(which)
        return tuple(one for one in self.asked if one.number > asked.number and not is_closed_form(one.request.method))

    def _found(self, which: int | str) -> tuple[Part, Asked, Asked | None]:
        """The part, the request, and what is left of the request."""
        for part in self.parts:
            for one in part.asked:
                if one.number != which and not (isinstance(which, str) and _names(one.request, which)):
                    continue
                if part.merged:
                    raise RequestError(
                        f"{one.names} cannot be taken back: the patch was cut to rank {part.patch.rank}, and its "
                        f"{len(part.asked)} requests cannot be told apart since. Forget the others anew, or allow a "
                        "higher rank."
                    )
                if isinstance(which, int) or len(one.request.concepts) == 1:
                    return part, one, None
                if not is_closed_form(one.request.method):
                    raise RequestError(
                        f"'{which}' was forgotten together with others in one training ({one.names}): give the "
                        f"request's number, {one.number}, to take them all back."
                    )
                rest = tuple(c for c in one.request.concepts if bare(c.name) != bare(which))
                return part, one, replace(one, request=replace(one.request, concepts=rest))
        there = listed([f"{one.number} ({one.names})" for one in self.asked])
        what = f"a request number {which}" if isinstance(which, int) else f"'{which}'"
        raise RequestError(f"This patch does not forget {what}: its requests are {there or 'none'}.")


# -- requests against one another ---------------------------------------------------------------------------------


def _in_order(parts: Sequence[Part | RecordedPart]) -> tuple[Asked, ...]:
    return tuple(sorted((one for part in parts for one in part.asked), key=lambda one: one.number))


def _next(parts: Sequence[Part | RecordedPart], request: ForgetRequest) -> Asked:
    """The request as the next one, with its number and settings. Raises :class:`RequestError` where it cannot be."""
    request.check()
    before = _in_order(parts)
    resolved = dataclasses.asdict(resolve_settings(get(request.method), request.preset, request.settings))
    _refuse_contradictions(before, request)
    new = Asked(before[-1].number + 1 if before else 1, request, json.loads(json.dumps(resolved)))
    if is_closed_form(request.method):
        _joint([*_solved_with(parts, request.method), new])
    return new


def _names(request: ForgetRequest, name: str) -> bool:
    return any(bare(concept.name) == bare(name) for concept in request.concepts)


def _said(concepts: Iterable[Concept]) -> dict[str, str]:
    """Every way to say the concepts in the templates, and the concept."""
    return {bare(t.format(c.name)): c.name for c in concepts for t in ("{}", *templates(c.kind))}


def _refuse_contradictions(before: Sequence[Asked], request: ForgetRequest) -> None:
    wanted, forgotten = _said(request.concepts), {}
    for one in before:
        for concept in one.request.concepts:
            forgotten[bare(concept.name)] = (concept, one.number)
    for concept in request.concepts:
        if (found := forgotten.get(bare(concept.name))) is not None:
            raise RequestError(
                f"'{concept.name}' is already forgotten, by request {found[1]}: leave it out, or take that one back "
                "first."
            )
        if concept.replacement and (found := forgotten.get(bare(concept.replacement))) is not None:
            raise RequestError(
                f"'{concept.replacement}' shall be shown instead of '{concept.name}', and request {found[1]} forgot "
                "it: name something else."
            )
    for one in before:
        for phrase in one.request.preserve:
            if (name := wanted.get(bare(phrase))) is not None:
                raise RequestError(
                    f"'{name}' shall be forgotten, and request {one.number} ({one.names}) preserves '{phrase}': take "
                    "that request back first, and ask for it again without."
                )
        for concept in one.request.concepts:
            if concept.replacement and (name := wanted.get(bare(concept.replacement))) is not None:
                raise RequestError(
                    f"'{name}' shall be forgotten, and request {one.number} shows it instead of '{concept.name}': take "
                    "that request back first, and ask for it again with something else."
                )
        said = _said(one.request.concepts)
        for phrase in request.preserve:
            if (name := said.get(bare(phrase))) is not None:
                raise RequestError(
                    f"The preserve list contains '{phrase}', and request {one.number} forgot '{name}': leave it out, "
                    "or take that request back first."
                )


# -- closed forms -------------------------------------------------------------------------------------------------


def _is_joint(part: Part | RecordedPart, method_id: str) -> bool:
    return not part.merged and part.asked[0].request.method == method_id and is_closed_form(method_id)


def _solved_with(parts: Sequence[Part | RecordedPart], method_id: str) -> tuple[Asked, ...]:
    """The requests that a further one of this closed form is solved together with."""
    return next((part.asked for part in parts if _is_joint(part, method_id)), ())


def _joint(asked: Sequence[Asked]) -> ForgetRequest:
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
        key=lambda concept: (KINDS.index(concept.kind), bare(concept.name)),
    )
    preserve = {normalised(phrase): phrase for one in asked for phrase in sorted(one.request.preserve)}
    return ForgetRequest(
        tuple(concepts),
        tuple(preserve[key] for key in sorted(preserve)),
        first.request.method,
        first.request.preset,
        first.settings,
        first.request.strength,
        min(one.request.seed for one in asked),
    )


def _solved(model: LatentDiffusion, asked: tuple[Asked, ...], progress: Progress | None, inputs: Inputs) -> Part:
    return Part(fit(model, _joint(asked), progress, inputs), tuple(map(_recorded, asked)))


def _recorded(asked: Asked) -> Asked:
    """As the record has it: where pictures were on somebody's machine does not travel."""
    return replace(asked, request=asked.request.without_images())


def _without_earlier(inputs: Inputs | None) -> Inputs:
    inputs = inputs or Inputs()
    if inputs.earlier is not None:
        raise RequestError("A history knows itself what was forgotten earlier: leave 'earlier' out of its inputs.")
    return inputs


# -- the record ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordedPart:
    """A part as the record has it: its requests, and its rank by projection or, before that, by layer."""

    merged: bool
    ranks: Mapping[str, int]
    about: Mapping[str, str]
    asked: tuple[Asked, ...]

    def rank_at(self, key: str) -> int:
        return self.ranks.get(key, self.ranks.get(key.rpartition(".")[2], 0))

    def part(self, patch: Patch, base: Mapping[str, str]) -> Part:
        about = {_PREFIX + key: text for key, text in {**self.about, **base}.items()}
        return Part(replace(patch, metadata=about), self.asked, self.merged)


@dataclass(frozen=True)
class Record:
    """What a patch's metadata say of the requests that made it: a :class:`History` without its factors."""

    parts: tuple[RecordedPart, ...]
    max_rank: int | None

    @property
    def asked(self) -> tuple[Asked, ...]:
        """Every request in the order asked."""
        return _in_order(self.parts)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """Everything that is forgotten, in the order asked."""
        return tuple(concept for one in self.asked for concept in one.request.concepts)

    def check(self, request: ForgetRequest) -> None:
        """Raise :class:`RequestError`, in words, where ``request`` cannot follow the ones before it."""
        _next(self.parts, request)


def read_record(metadata: Mapping[str, str]) -> Record:
    """The record in a patch's metadata; that of a patch of one request is made up from what it says of itself.

    Raises :class:`PatchError` where there is none.
    """
    try:
        if RECORD in metadata:
            return _parsed(json.loads(metadata[RECORD]))
        if _PREFIX + "request" in metadata:
            settings = json.loads(metadata.get(_PREFIX + "settings", "{}"))
            request = ForgetRequest.from_json(metadata[_PREFIX + "request"])
            asked = Asked(1, request, settings, metadata.get(_PREFIX + "version", VERSION))
            return Record((RecordedPart(False, {}, _about_of(metadata), (asked,)),), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PatchError(f"The record of this patch's requests cannot be read: {error}") from error
    if _PREFIX + "parts" in metadata:
        raise PatchError(
            "This patch was put together from several ones, and nothing says which part of it is whose: it cannot be "
            "continued, nor anything taken back."
        )
    raise PatchError(
        "This patch does not say which requests made it, so it cannot be continued, nor anything taken back."
    )


def _parsed(data: Any) -> Record:
    if data["schema"] != _SCHEMA:
        raise PatchError(f"it has schema {data['schema']!r}, and this version reads schema {_SCHEMA}.")
    parts = []
    for part in data["parts"]:
        asked = tuple(
            Asked(
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
        about = {str(key): str(text) for key, text in part["about"].items()}
        parts.append(RecordedPart(bool(part["merged"]), ranks, about, asked))
    if not parts:
        raise PatchError("it has no request.")
    numbers = [one.number for part in parts for one in part.asked]
    if len(set(numbers)) < len(numbers):
        raise PatchError("it has a request number twice.")
    return Record(tuple(parts), None if data["max_rank"] is None else int(data["max_rank"]))


def _ranks(whole: Patch, part: Patch) -> dict[str, int]:
    """The part's rank at every layer of the whole patch: by projection, and by layer where one differs from most."""
    ranks = {key: part.factors[key].rank if key in part.factors else 0 for key in whole.factors}
    usual: dict[str, int] = {}
    for which in dict.fromkeys(key.rpartition(".")[2] for key in ranks):
        found = Counter(rank for key, rank in ranks.items() if key.rpartition(".")[2] == which)
        usual[which] = found.most_common(1)[0][0]
    return usual | {key: rank for key, rank in ranks.items() if rank != usual[key.rpartition(".")[2]]}


def _about_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a method says of its own patch, beside what every patch says."""
    common = {_PREFIX + key for key in (*_BASE, *_OF_ONE, "version", "history", "parts", "format")}
    return {
        key.removeprefix(_PREFIX): text
        for key, text in metadata.items()
        if key.startswith(_PREFIX) and key not in common
    }


def _about(patch: Patch) -> dict[str, str]:
    return _about_of(patch.metadata)


def _alike(abouts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The entries that hold for the whole: a single part's own, and of several those that all have alike."""
    return {key: text for key, text in abouts[0].items() if all(about.get(key) == text for about in abouts[1:])}


def _of_one(asked: Asked) -> dict[str, str]:
    request = asked.request
    return {
        "preset": request.preset,
        "settings": json.dumps(dict(asked.settings), ensure_ascii=False),
        "request": request.to_json(),
        "strength": repr(float(request.strength)),
        "seed": str(request.seed),
    }
