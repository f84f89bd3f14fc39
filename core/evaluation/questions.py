"""Questions about the embedded model's world: prompts that name a concept, and prompts of the retain set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RequestError
from ..mini import vocabulary, world
from ..request.concept import normalized_phrase
from .drawing import LabeledImage, Picture

__all__ = ["ATTRIBUTES", "CATEGORIES", "Question", "find_concept", "retain_questions", "seed_of", "target_questions"]

CATEGORIES = ("object", "style", "identity")
ATTRIBUTES = (*CATEGORIES, "colour")


def find_concept(name: str) -> tuple[str, str]:
    """Look up a concept of the embedded model's world.

    Args:
        name: The concept's name; case and articles are ignored.

    Returns:
        The canonical name and its category.

    Raises:
        RequestError: If the probe does not know the concept; the message lists the known ones.
    """
    for category, words in vocabulary.CATEGORIES.items():
        for word in words:
            if normalized_phrase(word.name) == normalized_phrase(name):
                return word.name, category
    known = "; ".join(f"{c}: {', '.join(w.name for w in words)}" for c, words in vocabulary.CATEGORIES.items())
    raise RequestError(f"The probe knows no concept '{name}', so it cannot be measured: choose one of {known}.")


@dataclass(frozen=True)
class Question:
    """An image to sample and the category in which its label is checked against the prompt.

    Attributes:
        prompt: The prompt and the labels it names.
        seed: Seed of the image.
        category: The category that is checked.
        kind: Kind of the prompt, for benchmarks with several kinds.
    """

    prompt: world.Prompt
    seed: int
    category: str
    kind: str = ""

    @property
    def picture(self) -> Picture:
        """The prompt and seed to sample."""
        return Picture(self.prompt.text, self.seed)

    @property
    def expected(self) -> str:
        """The name in the checked category."""
        return str(getattr(self.prompt.expected, self.category))

    def is_correct(self, image: LabeledImage) -> bool:
        """Return whether the image's label matches the prompt in the checked category."""
        return bool(getattr(image.labels, self.category) == self.expected)

    def other_attributes(self) -> list[str]:
        """Return the other categories in which the prompt names something."""
        return [a for a in ATTRIBUTES if a != self.category and getattr(self.prompt.expected, a) != vocabulary.NONE]


def seed_of(*parts: object) -> int:
    """Derive a seed from the given parts; it is the same in every run and on every machine."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little") // 2


def _prompts(category: str, name: str, count: int, seed: int, without: tuple[str, ...] = ()) -> list[world.Prompt]:
    fixed = {"object": None, "style": None, "identity": None, category: name}
    return world.prompts(
        count,
        seed,
        object=fixed["object"],
        style=fixed["style"],
        identity=fixed["identity"],
        without=without,
        measured=True,
    )


def target_questions(name: str, count: int, seed: int = 0) -> list[Question]:
    """Return ``count`` questions whose prompts name the target concept, each checked for that concept."""
    name, category = find_concept(name)
    prompts = _prompts(category, name, count, seed_of("target", name, seed))
    return [Question(p, seed_of("target", name, seed, i), category) for i, p in enumerate(prompts)]


def retain_questions(category: str, count: int, seed: int = 0, without: Sequence[str] = ()) -> list[Question]:
    """Return ``count`` questions about the retain set of one category, distributed evenly over its concepts.

    A larger count extends the list and does not change its first questions.

    Args:
        category: Category of the concepts.
        count: Number of questions.
        seed: Seed of the prompts and images.
        without: Concepts that no prompt names.

    Raises:
        RequestError: If a name in ``without`` is unknown, or a category has no concept left.
    """
    excluded = tuple(find_concept(name)[0] for name in without)
    # a prompt about one category also names concepts of the others
    for each in (category, *CATEGORIES):
        if all(word.name in excluded for word in vocabulary.CATEGORIES[each]):
            raise RequestError(f"No {each} is left for the retain set: forget fewer concepts of this category.")
    names = [word.name for word in vocabulary.CATEGORIES[category] if word.name not in excluded]
    order = np.random.default_rng(seed_of("order", category, seed)).permutation(len(names))
    found = []
    for i in range(count):
        name = names[order[i % len(names)]]
        (prompt,) = _prompts(category, name, 1, seed_of("kept", category, seed, i), excluded)
        found.append(Question(prompt, seed_of("kept", category, seed, i, prompt.text), category))
    return found
