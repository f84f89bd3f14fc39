"""A sequence of requests on one base model, in which every request can be taken back.

A :class:`History` holds the requests in their order and the change that each made to the *base* weights. Its patch is
the sum of the changes, with their factors concatenated. The record of requests is in the patch's metadata, so that a
saved patch can be continued, or a request taken back from it.

Drift that accumulates from request to request is the main failure of continual unlearning (arXiv 2511.07970), so every
request is fitted against the base weights:

- **Closed forms** are solved again for all of their requests together. The result is the joint solution, bit-exact in
  whatever order the requests came; taking one back solves for the others. So they share settings and strength.
- **Trained methods** give each request a part of its own, trained while the earlier parts are applied
  (``inputs.earlier``); the retain set is preserved as the base model has it. Taking a request back drops its part;
  later parts stay as they were trained.

A bound of the rank (``max_rank``) truncates the sum to the nearest change of that rank. After that the parts cannot be
separated, and the record says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import PatchError, RequestError, listed
from ..models.latent_diffusion import LatentDiffusion
from ..patch.history import HistoryRecordPart, RequestRecord, history_to_dict, read_history, requests_in_order
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
    """A change whose requests belong together.

    Args:
        patch: The change to the base weights.
        records: One trained request, all requests of one closed form, or those of a truncated sum.
        merged: Whether it is a truncated sum, so that its requests cannot be separated.
    """

    patch: Patch
    records: tuple[RequestRecord, ...]
    merged: bool = False


@dataclass(frozen=True)
class History:
    """Requests that were fitted one after the other; immutable.

    Args:
        parts: The changes that the requests made.
        max_rank: Bound of the rank of the whole patch; ``None``: no bound.
    """

    parts: tuple[Part, ...] = ()
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank < 1:
            raise RequestError(f"The rank of a whole patch must be at least 1, not {self.max_rank}.")

    # -- content -------------------------------------------------------------------------------------------------

    @property
    def records(self) -> tuple[RequestRecord, ...]:
        """The record of every request, by number."""
        return requests_in_order(self.parts)

    @property
    def requests(self) -> tuple[ForgetRequest, ...]:
        """Every request, in order."""
        return tuple(record.request for record in self.records)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """Every forgotten concept, in the order of the requests."""
        return tuple(concept for request in self.requests for concept in request.concepts)

    @property
    def patch(self) -> Patch:
        """The sum of all parts, with the record in its metadata.

        Raises:
            PatchError: The history is empty.
        """
        if not self.parts:
            raise PatchError("Nothing is forgotten in this history, so there is no patch: forget a concept first.")
        whole = Patch.combined([(part.patch, 1.0) for part in self.parts])
        records = self.records
        base = self.parts[0].patch.about.of_base().to_strings()
        common = _common([part.patch.about.of_method().to_strings() for part in self.parts])
        about = PatchMetadata(
            version=VERSION,
            method=" + ".join(dict.fromkeys(record.request.method for record in records)),
            concepts=tuple(concept.name for concept in self.concepts),
            history=history_to_dict(self.parts, whole, self.max_rank),
        )
        if len(records) == 1:
            request = records[0].request
            about = replace(
                about,
                preset=request.preset,
                settings=records[0].settings,
                request=request,
                strength=request.strength,
                seed=request.seed,
            )
        return replace(whole, metadata={**base, **common, **about.to_strings()})

    # -- from and to a file --------------------------------------------------------------------------------------

    @classmethod
    def from_patch(cls, patch: Patch) -> History:
        """The history that made a patch, from the record in its metadata; a patch of one request is a history of one.

        Raises:
            PatchError: There is no record, or it does not match the ranks of the factors.
        """
        record = read_history(patch.metadata)
        base = patch.about.of_base()
        if base.base_model is None:
            raise PatchError("This patch does not say which model it was made on, so it cannot be continued.")
        if len(record.parts) == 1:
            return cls((replace(_part_of(record.parts[0], patch, base)),), record.max_rank)
        taken = dict.fromkeys(patch.factors, 0)
        parts = []
        for part in record.parts:
            factors = {}
            for key, factor in patch.factors.items():
                start, rank = taken[key], part.rank_at(key)
                taken[key] += rank
                if rank and taken[key] <= factor.rank:
                    columns = slice(start, taken[key])
                    factors[key] = LowRank(factor.up[:, columns].clone(), factor.down[columns].clone())
            if not factors:
                break
            parts.append(_part_of(part, Patch(factors), base))
        if len(parts) < len(record.parts) or any(taken[key] != f.rank for key, f in patch.factors.items()):
            raise PatchError(
                "The factors of this patch do not match its record: another program has changed its ranks, so its "
                "requests cannot be separated. Use the file as it was saved here."
            )
        return cls(tuple(parts), record.max_rank)

    # -- forgetting ----------------------------------------------------------------------------------------------

    def check(self, plan: Plan) -> None:
        """Check whether a request can be the next one.

        Raises:
            RequestError: It contradicts an earlier request, or cannot be solved together with those of its method.
        """
        next_record(self.parts, plan)

    def forget(
        self,
        model: LatentDiffusion,
        plan: Plan,
        progress: Progress | None = None,
        inputs: Inputs | None = None,
    ) -> History:
        """Fit one more request on the same base model.

        Args:
            model: The base model.
            plan: The request to add.
            progress: Called with every step; may raise :class:`Cancelled`.
            inputs: Images and a work folder; ``earlier`` must be empty.

        Returns:
            The history with the request added.

        Raises:
            RequestError: As :meth:`check` and :func:`fit`.
            PatchError: The history was made on another base model, or as :func:`fit`.
        """
        new = next_record(self.parts, plan)
        self.check_base(model)
        inputs = _without_earlier(inputs)
        if not plan.method.trained:
            records = (*solved_with(self.parts, plan.request.method), new)
            return self._with(_solved(model, records, progress, inputs))
        earlier = self.patch if self.parts else None
        patch = fit(model, plan, progress, replace(inputs, earlier=earlier))
        return self._with(Part(patch, (_without_images(new),)))

    def check_base(self, model: LatentDiffusion) -> None:
        """Check that a model is the one that the history was made on.

        Raises:
            PatchError: It has other weights, or gives other text states.
        """
        if not self.parts:
            return
        base = self.parts[0].patch.about
        if base.base_model != model.model_hash:
            raise PatchError(
                f"This patch was made on another base model ('{base.base_name or 'unknown'}') than '{model.name}': "
                "load that model to continue its sequence of requests, or start a new patch for this one."
            )
        layer, here = base.text_layer, str(getattr(model.text, "layer", "unknown"))
        if layer is not None and layer != here:
            raise PatchError(
                f"This patch was made with other text states ({layer}) than the model gives now ({here}): load the "
                "model with the same clip skip."
            )

    def _with(self, new: Part) -> History:
        """With a new part; a closed form replaces the part that it solves again."""
        method = new.records[0].request.method
        joint = [is_joint(part, method) for part in self.parts]
        if any(joint):
            parts = tuple(new if replaced else part for part, replaced in zip(self.parts, joint, strict=True))
        else:
            parts = (*self.parts, new)
        return replace(self, parts=parts).bounded(self.max_rank)

    def bounded(self, max_rank: int | None) -> History:
        """The same history with a bound of the whole patch's rank.

        If the rank is higher, the sum is truncated to the nearest change of rank ``max_rank``. Several parts become
        one, and their requests cannot be taken back any more; a single closed form can still be solved again.
        """
        found = replace(self, max_rank=max_rank)
        if max_rank is None or not self.parts:
            return found
        whole = self.patch
        if whole.rank <= max_rank:
            return found
        cut = whole.truncated(max_rank)
        if len(self.parts) == 1:
            # the metadata of the part, not those of the whole patch
            part = self.parts[0]
            return replace(found, parts=(replace(part, patch=replace(cut, metadata=part.patch.metadata)),))
        return replace(found, parts=(Part(cut, self.records, merged=True),))

    # -- taking back ---------------------------------------------------------------------------------------------

    def without(
        self,
        which: int | str,
        model: LatentDiffusion | None = None,
        progress: Progress | None = None,
        inputs: Inputs | None = None,
    ) -> History:
        """Take one request back.

        A single concept of a request with several can be taken back from a closed form, not from a trained part.

        Args:
            which: Number of the request, or name of a concept.
            model: The base model; needed if :meth:`solves_anew`.
            progress: Called with every step.
            inputs: As for :meth:`forget`.

        Returns:
            The history without the request.

        Raises:
            RequestError: There is no such request, it cannot be separated from others, or the model is missing.
            PatchError: The history was made on another base model.
        """
        part, record, rest = self._found(which)
        left = tuple(new for old in part.records if (new := rest if old is record else old) is not None)
        if not left:
            return replace(self, parts=tuple(other for other in self.parts if other is not part))
        if model is None:
            raise RequestError(
                f"The requests of '{record.request.method}' were solved together: to take {record.names} back, the "
                "others are solved again, and that needs the base model."
            )
        self.check_base(model)
        solved = _solved(model, left, progress, _without_earlier(inputs))
        parts = tuple(solved if other is part else other for other in self.parts)
        return replace(self, parts=parts).bounded(self.max_rank)

    def solves_anew(self, which: int | str) -> bool:
        """Whether taking this request back solves a closed form again. Raises :class:`RequestError` as ``without``."""
        part, _, rest = self._found(which)
        return len(part.records) > 1 or rest is not None

    def trained_on(self, which: int | str) -> tuple[RequestRecord, ...]:
        """The later requests that were trained with this one applied. Raises :class:`RequestError` as ``without``."""
        _, record, _ = self._found(which)
        later = (other for other in self.records if other.number > record.number)
        return tuple(other for other in later if not is_closed_form(other.request.method))

    def _found(self, which: int | str) -> tuple[Part, RequestRecord, RequestRecord | None]:
        """The part and record of a request, and the record of its other concepts if it has some that stay."""
        for part in self.parts:
            for record in part.records:
                request = record.request
                if record.number != which and not (isinstance(which, str) and _names(request, which)):
                    continue
                if part.merged:
                    raise RequestError(
                        f"{record.names} cannot be taken back: the patch was cut to rank {part.patch.rank}, and its "
                        f"{len(part.records)} requests cannot be separated since. Forget the others again, with a "
                        "higher rank or without a bound."
                    )
                if isinstance(which, int) or len(request.concepts) == 1:
                    return part, record, None
                if not is_closed_form(request.method):
                    raise RequestError(
                        f"'{which}' was forgotten together with others in one training ({record.names}): give the "
                        f"request's number, {record.number}, to take them all back."
                    )
                key = canonical_phrase(which)
                others = tuple(concept for concept in request.concepts if canonical_phrase(concept.name) != key)
                return part, record, replace(record, request=replace(request, concepts=others))
        known = listed([f"{record.number} ({record.names})" for record in self.records])
        what = f"a request number {which}" if isinstance(which, int) else f"'{which}'"
        raise RequestError(f"This patch does not forget {what}: its requests are {known or 'none'}.")


def _names(request: ForgetRequest, name: str) -> bool:
    return any(canonical_phrase(concept.name) == canonical_phrase(name) for concept in request.concepts)


def _solved(
    model: LatentDiffusion, records: tuple[RequestRecord, ...], progress: Progress | None, inputs: Inputs
) -> Part:
    patch = fit(model, plan_request(joint_request(records)), progress, inputs)
    return Part(patch, tuple(map(_without_images, records)))


def _without_images(record: RequestRecord) -> RequestRecord:
    """The record as it is saved: without the paths of local images."""
    return replace(record, request=record.request.without_images())


def _without_earlier(inputs: Inputs | None) -> Inputs:
    inputs = inputs or Inputs()
    if inputs.earlier is not None:
        raise RequestError("A history supplies the earlier patch itself: leave 'earlier' out of its inputs.")
    return inputs


def _part_of(record: HistoryRecordPart, patch: Patch, base: PatchMetadata) -> Part:
    """A part, from its record and its factors."""
    metadata = {**record.about.to_strings(), **base.to_strings()}
    return Part(replace(patch, metadata=metadata), record.records, record.merged)


def _common(several: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The entries that all of ``several`` have with the same value."""
    first, *others = several
    return {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}
