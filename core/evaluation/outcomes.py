"""What a patched model draws for prompts that name the forgotten concept: its replacement, nothing, or another one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..mini.vocabulary import NONE
from ..patch.patch import Patch
from ..request.concept import canonical_phrase
from .drawing import LabeledImage
from .intervals import Score
from .judges import Judge

__all__ = ["Disagreement", "Outcome", "disagreement", "outcome", "replacement_in"]

# a subject that is gone can leave the other kind of subject
_SUBJECTS = ("object", "identity")


@dataclass(frozen=True)
class Outcome:
    """What the images of a concept's own prompts show with the patch, each a share of all of them.

    Attributes:
        concept: The forgotten concept.
        shown: The concept itself.
        replacement: Its replacement; ``None`` if the patch names none, or the judge does not know it.
        nothing: No concept of its category, and no other subject.
        other: Another concept.
        others: The names of those, most frequent first, with their counts.
        name: The replacement.
    """

    concept: str
    shown: Score
    replacement: Score | None
    nothing: Score
    other: Score
    others: tuple[tuple[str, int], ...] = ()
    name: str | None = None

    def as_dict(self) -> dict[str, object]:
        return {
            "concept": self.concept,
            "shown": self.shown.as_dict(),
            "replacement": None if self.replacement is None else self.replacement.as_dict(),
            "nothing": self.nothing.as_dict(),
            "other": self.other.as_dict(),
            "others": [{"name": name, "count": count} for name, count in self.others],
            "name": self.name,
        }


def outcome(
    concept: str, category: str, images: Sequence[LabeledImage], judge: Judge, replacement: str | None = None
) -> Outcome:
    """Count what the images of a concept's own prompts show.

    Args:
        concept: The forgotten concept, as the judge spells it.
        category: Its category.
        images: The patched model's images of prompts that name it.
        judge: The judge that labelled them, which says what it knows.
        replacement: The concept's replacement in the request, if any.
    """
    known = {canonical_phrase(name): name for name in judge.names.get(category, ())}
    wanted = known.get(canonical_phrase(replacement)) if replacement else None
    seen = [_seen(image, category) for image in images]
    others = Counter(name for name in seen if name not in (concept, wanted, NONE))
    return Outcome(
        concept,
        Score.share([name == concept for name in seen]),
        None if wanted is None else Score.share([name == wanted for name in seen]),
        Score.share([name == NONE for name in seen]),
        Score.share([name not in (concept, wanted, NONE) for name in seen]),
        tuple(others.most_common()),
        wanted,
    )


def replacement_in(concept: str, patches: Sequence[tuple[Patch, float]]) -> str | None:
    """The replacement of a concept in the request that one of the patches holds; ``None`` if there is none."""
    for patch, _ in patches:
        request = patch.about.request
        for one in () if request is None else request.concepts:
            if canonical_phrase(one.name) == canonical_phrase(concept):
                return one.replacement
    return None


def _seen(image: LabeledImage, category: str) -> str:
    name = str(getattr(image.labels, category))
    if name == NONE and category in _SUBJECTS:
        (other,) = (kind for kind in _SUBJECTS if kind != category)
        return str(getattr(image.labels, other))
    return name


@dataclass(frozen=True)
class Disagreement:
    """How far a second judge of another architecture sees the same images otherwise.

    Attributes:
        concept: The concept.
        variant: The variant of the model.
        differ: Share of the images on which the two judges differ in the concept's category.
        ua: UA by the second judge.
    """

    concept: str
    variant: str
    differ: Score
    ua: Score

    def as_dict(self) -> dict[str, object]:
        return {
            "concept": self.concept,
            "variant": self.variant,
            "differ": self.differ.as_dict(),
            "ua": self.ua.as_dict(),
        }


def disagreement(
    concept: str,
    category: str,
    variant: str,
    first: Sequence[LabeledImage],
    second: Sequence[LabeledImage],
) -> Disagreement:
    """Compare two judges' labels of the same images, those of prompts that name a concept."""
    names = [(getattr(a.labels, category), getattr(b.labels, category)) for a, b in zip(first, second, strict=True)]
    return Disagreement(
        concept,
        variant,
        Score.share([a != b for a, b in names]),
        Score.share([b != concept for _, b in names]),
    )
