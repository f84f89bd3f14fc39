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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import PatchError, RequestError, listed
from ..models.latent_diffusion import LatentDiffusion
from ..patch.history import (
    HistoryRecordPart,
    RequestRecord,
    history_to_dict,
    read_history,
    requests_in_order,
)
from ..patch.low_rank import LowRank
from ..patch.metadata import PatchMetadata
from ..patch.patch import Patch
from ..progress import Progress
from ..request.concept import Concept, canonical_phrase
from ..request.plan import Plan
from ..request.request import ForgetRequest
from ..version import VERSION
from .base import Inputs
from .fit import fit
from .registry import plan_request
from .sequence_rules import is_closed_form, is_joint, joint_request, next_record, solved_with

__all__ = ["History", "Part"]


@dataclass(frozen=True)
class Part:
    """What one trained request, all requests of one closed form, or a ``merged`` sum that was cut changed."""

    patch: Patch
    asked: tuple[RequestRecord, ...]
    merged: bool = False


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
    def asked(self) -> tuple[RequestRecord, ...]:
        """Every request in the order asked."""
        return requests_in_order(self.parts)

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
        base = self.parts[0].patch.about.of_base().to_strings()
        common = _common([part.patch.about.of_method().to_strings() for part in self.parts])
        about = PatchMetadata(
            version=VERSION,
            method=" + ".join(dict.fromkeys(one.request.method for one in asked)),
            concepts=tuple(concept.name for concept in self.concepts),
            history=history_to_dict(self.parts, whole, self.max_rank),
        )
        if len(asked) == 1:
            request = asked[0].request
            about = replace(
                about,
                preset=request.preset,
                settings=asked[0].settings,
                request=request,
                strength=request.strength,
                seed=request.seed,
            )
        return replace(whole, metadata={**base, **common, **about.to_strings()})

    # -- from and to a file --------------------------------------------------------------------------------------

    @classmethod
    def from_patch(cls, patch: Patch) -> History:
        """The history that a patch was made by, as its metadata say; a patch of one request is a history of one.

        Raises :class:`PatchError` where they do not say it, or where they no longer fit the factors.
        """
        record = read_history(patch.metadata)
        base = patch.about.of_base()
        if base.base_model is None:
            raise PatchError("This patch does not say which model it was made on, so it cannot be continued.")
        if len(record.parts) == 1:
            return cls((replace(_of_record(record.parts[0], patch, base)),), record.max_rank)
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
            parts.append(_of_record(one, Patch(factors), base))
        if len(parts) < len(record.parts) or any(taken[key] != f.rank for key, f in patch.factors.items()):
            raise PatchError(
                "This patch no longer is what its record says: another program has changed its ranks since, so its "
                "requests cannot be told apart."
            )
        return cls(tuple(parts), record.max_rank)

    # -- forgetting ----------------------------------------------------------------------------------------------

    def check(self, plan: Plan) -> None:
        """Raise :class:`RequestError` where ``plan`` cannot follow the requests before it."""
        next_record(self.parts, plan)

    def forget(
        self,
        model: LatentDiffusion,
        plan: Plan,
        progress: Progress | None = None,
        inputs: Inputs | None = None,
    ) -> History:
        """The history with ``plan.request`` forgotten too, on the same base model.

        Raises :class:`RequestError` as :meth:`check`, :class:`PatchError` for another base model, and as
        :func:`fit`.
        """
        new = next_record(self.parts, plan)
        self.check_base(model)
        inputs = _without_earlier(inputs)
        if not plan.method.trained:
            together = (*solved_with(self.parts, plan.request.method), new)
            return self._with(_solved(model, together, progress, inputs))
        earlier = self.patch if self.parts else None
        patch = fit(model, plan, progress, replace(inputs, earlier=earlier))
        return self._with(Part(patch, (_recorded(new),)))

    def check_base(self, model: LatentDiffusion) -> None:
        """Raise :class:`PatchError` unless the history was made on this model and on these text states."""
        if not self.parts:
            return
        base = self.parts[0].patch.about
        if base.base_model != model.model_hash:
            raise PatchError(
                f"This patch was made on another base model ('{base.base_name or 'unknown'}') than '{model.name}': a "
                "sequence of requests goes on where it began; load that model, or start a new patch for this one."
            )
        layer, here = base.text_layer, str(getattr(model.text, "layer", "unknown"))
        if layer is not None and layer != here:
            raise PatchError(
                f"This patch was made with other text states ({layer}) than the model gives now ({here}): load the "
                "model with the same clip skip."
            )

    def _with(self, new: Part) -> History:
        """With a new part, in place of the joint one it solves anew, if there is one."""
        joint = [is_joint(part, new.asked[0].request.method) for part in self.parts]
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

    def trained_on(self, which: int | str) -> tuple[RequestRecord, ...]:
        """The later requests that were trained with this one's change on; raises as ``without``."""
        _, asked, _ = self._found(which)
        return tuple(one for one in self.asked if one.number > asked.number and not is_closed_form(one.request.method))

    def _found(self, which: int | str) -> tuple[Part, RequestRecord, RequestRecord | None]:
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
                rest = tuple(c for c in one.request.concepts if canonical_phrase(c.name) != canonical_phrase(which))
                return part, one, replace(one, request=replace(one.request, concepts=rest))
        there = listed([f"{one.number} ({one.names})" for one in self.asked])
        what = f"a request number {which}" if isinstance(which, int) else f"'{which}'"
        raise RequestError(f"This patch does not forget {what}: its requests are {there or 'none'}.")


def _names(request: ForgetRequest, name: str) -> bool:
    return any(canonical_phrase(concept.name) == canonical_phrase(name) for concept in request.concepts)


def _solved(
    model: LatentDiffusion, asked: tuple[RequestRecord, ...], progress: Progress | None, inputs: Inputs
) -> Part:
    return Part(fit(model, plan_request(joint_request(asked)), progress, inputs), tuple(map(_recorded, asked)))


def _recorded(asked: RequestRecord) -> RequestRecord:
    """As the record has it: where pictures were on somebody's machine does not travel."""
    return replace(asked, request=asked.request.without_images())


def _without_earlier(inputs: Inputs | None) -> Inputs:
    inputs = inputs or Inputs()
    if inputs.earlier is not None:
        raise RequestError("A history knows itself what was forgotten earlier: leave 'earlier' out of its inputs.")
    return inputs


def _of_record(recorded: HistoryRecordPart, patch: Patch, base: PatchMetadata) -> Part:
    """A part again, from its record and its factors."""
    metadata = {**recorded.about.to_strings(), **base.to_strings()}
    return Part(replace(patch, metadata=metadata), recorded.asked, recorded.merged)


def _common(several: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The entries that all of ``several`` have with the same value."""
    first, *others = several
    return {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}
