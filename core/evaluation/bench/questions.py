"""Questions of a ConceptBench about a concept: target, in-domain and cross-domain prompts.

A prompt has the same seed for every concept, so that the unedited model's images are shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count as counted
from itertools import islice

import numpy as np

from ...errors import RequestError
from ...mini.vocabulary import article
from ...mini.world import Labels, Prompt
from ...request.concept import KINDS, canonical_phrase, normalized_phrase
from ..questions import Question, seed_of
from ..scores import MIN_COUNT, QuestionSets
from .concept_bench import PROMPT_KINDS, BenchConcept, ConceptBench, contains_phrase, find_names
from .prompt_lists import ListedPrompt

__all__ = ["LISTED", "bench_questions"]

# kind of the prompts from a user's prompt list
LISTED = "listed"
# retain prompts name the concept, because the unedited model draws most of these correctly
_RETAIN_KINDS = ("plain", "compositional")
# templates for neighbours that are not concepts of the benchmark and so have no prompts
_OF_NEIGHBOURS = {
    "object": ("a photo of {}", "a picture of {}", "{}"),
    "style": ("a picture in the style of {}", "a painting in the style of {}"),
    "identity": ("a photo of {}", "a portrait of {}", "a picture of {}"),
}


def bench_questions(
    bench: ConceptBench,
    names: Mapping[str, Sequence[str]],
    name: str,
    count: int = 24,
    seed: int = 0,
    without: Sequence[str] = (),
    listed: Sequence[ListedPrompt] = (),
) -> QuestionSets:
    """Return the questions of a benchmark for one concept.

    The target questions cycle through the four kinds of prompts (and ``listed`` as a fifth), with new seeds in each
    round. The in-domain questions are distributed evenly over the neighbours and the other concepts of the category,
    the cross-domain questions over the other categories and their concepts. Retain prompts are plain or compositional,
    and contain neither the concept nor anything in ``without``, by name or synonym. Other names in a prompt are checked
    as well, except in indirect prompts, which only describe.

    Args:
        bench: The benchmark.
        names: The judge's class names by category; see :class:`Judge`.
        name: The concept.
        count: Questions per cell.
        seed: Seed of prompts and images.
        without: Further names to exclude from the retain set.
        listed: Prompts about the concept from a user's list.

    Raises:
        RequestError: If there are too few images, the benchmark or the judge does not know the concept, or a cell has
            no questions.
    """
    if count < MIN_COUNT:
        raise RequestError(f"{count} images per cell are too few to measure: use at least {MIN_COUNT}.")
    concept = bench.find(name)
    category = concept.category
    excluded = [concept, *(bench.find(other) for other in without if bench.has(other))]
    banned = [phrase for one in excluded for phrase in (one.name, *one.synonyms)]
    banned += [other for other in without if not bench.has(other)]
    builder = _QuestionBuilder(bench, names, banned, seed)
    builder.check_known(concept.name, category)
    target = list(islice(builder.target_questions(concept, listed), count))
    near = [n for n in concept.neighbours if not any(contains_phrase(n, phrase) for phrase in banned)]
    same = builder.retain_questions(category, count, near)
    others = [c for c in KINDS if c != category and builder.concepts(c)]
    if not others:
        raise RequestError(
            f"The benchmark contains only the category '{category}', so cross-domain retention cannot be measured: "
            "combine it with one of the built-in benchmarks."
        )
    # split evenly if there are two other categories
    half = count // 2 if len(others) > 1 else 0
    other = builder.retain_questions(others[0], count - half) + builder.retain_questions(others[-1], half)
    keys = {canonical_phrase(neighbour) for neighbour in near}
    named = dict.fromkeys(question.expected for question in same)
    return QuestionSets(target, same, other, tuple(name for name in named if canonical_phrase(name) in keys))


class _QuestionBuilder:
    """Builds the questions for one concept; no retain prompt contains a ``banned`` phrase."""

    def __init__(
        self, bench: ConceptBench, names: Mapping[str, Sequence[str]], banned: Sequence[str], seed: int
    ) -> None:
        self.bench, self.names, self.banned, self.seed = bench, names, banned, seed

    def check_known(self, name: str, category: str) -> str:
        """Return the judge's spelling of the name, or raise :class:`RequestError` if the judge does not know it."""
        for known in self.names.get(category, ()):
            if canonical_phrase(known) == canonical_phrase(name):
                return known
        raise RequestError(
            f"The judge knows no {category} '{name}', so it cannot be measured: use a benchmark of names that it knows."
        )

    def _question(self, text: str, name: str, category: str, kind: str, turn: int, seed: int | None = None) -> Question:
        expected = {category: self.check_known(name, category)}
        if kind != "indirect":
            for other, known in self.names.items():
                named = find_names(text, known) if other != category else []
                if len(named) == 1:  # with two names the expected label is ambiguous
                    expected[other] = named[0]
        image_seed = seed_of("bench", text, turn, self.seed) if seed is None else seed
        return Question(Prompt(text, Labels(**expected)), image_seed, category, kind)

    def target_questions(self, concept: BenchConcept, listed: Sequence[ListedPrompt]) -> Iterator[Question]:
        """Yield the concept's own prompts endlessly, cycling through the kinds."""
        kinds = [(kind, [ListedPrompt(text) for text in concept.prompts[kind]]) for kind in PROMPT_KINDS]
        if listed:
            kinds.append((LISTED, list(listed)))
        for i in counted():
            kind, prompts = kinds[i % len(kinds)]
            turn, at = divmod(i // len(kinds), len(prompts))
            given = prompts[at].seed
            # a list's seed applies to the first round only, so that later rounds give other images
            seed = None if given is None or turn else given
            yield self._question(prompts[at].text, concept.name, concept.category, kind, turn, seed)

    def concepts(self, category: str) -> list[BenchConcept]:
        """Return the concepts of a category that are not banned and have a prompt without banned phrases."""
        found = [one for one in self.bench.concepts if one.category == category]
        return [one for one in found if not self._says_banned(one.name) and self._prompts(one)]

    def _says_banned(self, text: str) -> bool:
        return any(contains_phrase(text, phrase) for phrase in self.banned)

    def _prompts(self, concept: BenchConcept) -> list[tuple[str, str]]:
        longest = max(len(concept.prompts[kind]) for kind in _RETAIN_KINDS)
        rows = [
            (kind, concept.prompts[kind][i])
            for i in range(longest)
            for kind in _RETAIN_KINDS
            if i < len(concept.prompts[kind])
        ]
        return [(kind, text) for kind, text in rows if not self._says_banned(text)]

    def retain_questions(self, category: str, count: int, near: Sequence[str] = ()) -> list[Question]:
        """Return ``count`` questions, distributed evenly over the category's concepts and the neighbours ``near``."""
        pools = {canonical_phrase(one.name): self._of_concept(one) for one in self.concepts(category)}
        for neighbour in near:
            pools.setdefault(canonical_phrase(neighbour), self._of_neighbour(neighbour, category))
        if not pools:
            raise RequestError(
                f"The benchmark has no other {category} for the retain set: give the concept neighbours, or combine it "
                "with one of the built-in benchmarks."
            )
        names = sorted(pools)
        order = np.random.default_rng(seed_of("bench order", category, self.seed)).permutation(len(names))
        return [next(pools[names[order[i % len(names)]]]) for i in range(count)]

    def _of_concept(self, concept: BenchConcept) -> Iterator[Question]:
        prompts = self._prompts(concept)
        for turn in counted():
            for kind, text in prompts:
                yield self._question(text, concept.name, concept.category, kind, turn)

    def _of_neighbour(self, name: str, category: str) -> Iterator[Question]:
        has_article = canonical_phrase(name) != normalized_phrase(name)
        phrase = name if has_article or category != "object" else f"{article(name)} {name}"
        for turn in counted():
            for template in _OF_NEIGHBOURS[category]:
                yield self._question(template.format(phrase), name, category, "plain", turn)
