"""What a concept without a replacement is mapped to: the mean of a few phrases of its kind.

The mean of everything of a kind leaves the choice to the model, whose favourite may be the concept. So it is that of
the few phrases whose text states are farthest from the concept's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..models.text_encoders import TextEncoder, encoded_batches
from ..progress import Progress
from ..prompts.everyday import COMMON, overlaps
from ..request.concept import canonical_phrase, normalized_phrase, templates
from ..request.request import ForgetRequest

__all__ = ["CANDIDATES", "MEAN_OF", "NAMED", "mean_candidates", "mean_note", "mean_phrases"]

# phrases in the mean, and those that they are chosen from
MEAN_OF, CANDIDATES = 4, 16
# concepts in a patch's note
NAMED = 3


def mean_candidates(kind: str, request: ForgetRequest) -> tuple[str, ...]:
    """At most :data:`CANDIDATES` phrases that concepts of this kind may be mapped to; none if all are forgotten.

    They are the preserved phrases, except everyday words of another kind, because a style has no place in prompts about
    objects. Where they are fewer than :data:`MEAN_OF`, everyday words of the kind join them. Both are taken at equal
    distances from their lists.
    """
    targets = [normalized_phrase(concept.name) for concept in request.concepts]
    other_kinds = {canonical_phrase(word) for other, words in COMMON.items() if other != kind for word in words}
    preserved = [phrase for phrase in request.preserve if canonical_phrase(phrase) not in other_kinds]
    everyday = [word for word in COMMON[kind] if not overlaps(word, targets) and word not in preserved]
    found = _spread(preserved, CANDIDATES)
    return (*found, *(_spread(everyday, CANDIDATES - len(found)) if len(found) < MEAN_OF else ()))


def mean_phrases(
    encoder: TextEncoder,
    request: ForgetRequest,
    names: Sequence[str],
    progress: Progress | None = None,
    count: int = MEAN_OF,
) -> dict[str, tuple[str, ...]]:
    """The phrases whose mean each concept is mapped to: so many candidates, the farthest from it first.

    Distances are between the means of the text states of prompts in the first template of the kind.

    Args:
        encoder: The text encoder.
        request: The request.
        names: Names of the concepts that are mapped to a mean.
        progress: Called while the prompts are encoded; may raise :class:`Cancelled`.
        count: Phrases of each concept.

    Returns:
        The phrases by the concept's name, without concepts that have no candidates.
    """
    found: dict[str, tuple[str, ...]] = {}
    alone = [concept for concept in request.concepts if concept.name in names]
    for kind in dict.fromkeys(concept.kind for concept in alone):
        of_kind = [concept.name for concept in alone if concept.kind == kind]
        candidates = mean_candidates(kind, request)
        if not candidates:
            continue
        prompts = [templates(kind)[0].format(phrase) for phrase in (*of_kind, *candidates)]
        means = torch.cat([states.mean() for states in encoded_batches(encoder, prompts, progress)]).double()
        distances = torch.cdist(means[: len(of_kind)], means[len(of_kind) :])
        for name, order in zip(of_kind, distances.argsort(dim=1, descending=True, stable=True).tolist(), strict=True):
            found[name] = tuple(candidates[i] for i in order[:count])
    return found


def mean_note(means: Mapping[str, Sequence[str]]) -> str | None:
    """What :func:`mean_phrases` found, for the user; ``None``: nothing. Of many concepts the first few are named."""
    if not means:
        return None
    mixed = {name: f"{'a mix of ' if len(means[name]) > 1 else ''}{', '.join(means[name])}" for name in means}
    named = [f"'{name}' becomes {mixed[name]}" for name in list(means)[:NAMED]]
    more = f"; {len(means) - NAMED} more likewise" if len(means) > NAMED else ""
    return f"Without a replacement, {'; '.join(named)}{more}."


def _spread(phrases: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the phrases, at equal distances."""
    if len(phrases) <= count:
        return list(phrases)
    return [phrases[i * len(phrases) // count] for i in range(count)]
