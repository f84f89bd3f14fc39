"""Retention of every single concept, because a mean over many hides the one that a patch damages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import cosine_similarity

from ..models.text_encoders import TextEncoder, encode_prompts, segments_of
from ..models.token_positions import phrase_span
from .drawing import LabeledImage
from .intervals import Score
from .questions import Question

__all__ = ["ENOUGH", "Retained", "lowest", "retained_scores", "text_distances", "with_distances"]

# pictures of one concept below which its share says too little to name it as the lowest
ENOUGH = 24


@dataclass(frozen=True)
class Retained:
    """Retention of one concept that is kept.

    Attributes:
        name: The concept.
        category: Its category.
        kept: Its accuracy relative to the unedited model on the same prompts and seeds; ``None`` if the unedited model
            draws none of them correctly.
        n: Number of its prompts.
        wording: The wording in which least of it is kept, if wordings were measured.
        distance: Distance of its name to the forgotten concept's in the text encoder's states: 1 - cosine.
    """

    name: str
    category: str
    kept: Score | None
    n: int
    wording: str | None = None
    distance: float | None = None

    def as_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "category": self.category,
            "kept": None if self.kept is None else self.kept.as_dict(),
            "n": self.n,
            "wording": self.wording,
            "distance": self.distance,
        }


def retained_scores(
    questions: Sequence[Question], before: Sequence[LabeledImage], after: Sequence[LabeledImage]
) -> tuple[Retained, ...]:
    """Score each concept of the retain set, in the order of their first questions.

    Args:
        questions: Questions of the retain set.
        before: Images of the unedited model, one a question.
        after: Images of the patched model.
    """
    found: dict[tuple[str, str], list[tuple[str, bool, bool]]] = {}
    for question, was, now in zip(questions, before, after, strict=True):
        row = (question.kind, question.is_correct(was), question.is_correct(now))
        found.setdefault((question.expected, question.category), []).append(row)
    return tuple(
        Retained(
            name,
            category,
            _ratio(rows),
            len(rows),
            _lowest_wording(rows),
        )
        for (name, category), rows in found.items()
    )


def _ratio(rows: Sequence[tuple[str, bool, bool]]) -> Score | None:
    before = [was for _, was, _ in rows]
    return Score.ratio([now for _, _, now in rows], before) if any(before) else None


def _lowest_wording(rows: Sequence[tuple[str, bool, bool]]) -> str | None:
    """The kind of prompts that keeps least of a concept; ``None`` if the prompts have no kinds."""
    shares = {}
    for kind in dict.fromkeys(kind for kind, _, _ in rows if kind):
        score = _ratio([row for row in rows if row[0] == kind])
        if score is not None:
            shares[kind] = score.value
    return min(shares, key=lambda kind: shares[kind]) if shares else None


def lowest(retained: Sequence[Retained], enough: int = ENOUGH) -> Retained | None:
    """The concept that is kept least; ``None`` if no concept has ``enough`` prompts."""
    known = [one for one in retained if one.kept is not None and one.n >= enough]
    return min(known, key=lambda one: one.kept.value if one.kept else 1.0) if known else None


@torch.no_grad()
def text_distances(encoder: TextEncoder, name: str, others: Sequence[str]) -> dict[str, float]:
    """Distances of names to a name in text space: 1 - cosine of the states of their last tokens.

    Of several encoders, the first one's states count.

    Args:
        encoder: The text encoder.
        name: The forgotten concept.
        others: The names to compare it with.
    """
    every = list(dict.fromkeys([name, *others]))
    offset, first = segments_of(encoder)[0]
    states = encode_prompts(encoder, every).hidden.float().cpu()
    ends = [offset + sum(phrase_span(first, one, one)) - 1 for one in every]
    rows = {one: states[i, end] for i, (one, end) in enumerate(zip(every, ends, strict=True))}
    return {one: 1 - float(cosine_similarity(rows[name], rows[one], dim=0)) for one in others}


def with_distances(retained: Sequence[Retained], distances: Mapping[str, float]) -> tuple[Retained, ...]:
    """Add the distance of each name; ``None`` where it is not known."""
    return tuple(replace(one, distance=distances.get(one.name)) for one in retained)
