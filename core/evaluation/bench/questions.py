"""What a ConceptBench asks about a concept: its own prompts, those of its category, those of the other categories.

A prompt is drawn with the same seed wherever it is asked, so that the unedited model's pictures serve every concept.
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
from ..scores import MIN_COUNT, Question, QuestionSets, seed_of
from .concept_bench import PROMPT_KINDS, BenchConcept, ConceptBench, contains_phrase, find_names
from .prompt_lists import ListedPrompt

__all__ = ["LISTED", "bench_questions"]

# a kind of prompt beside the file's own: those of a list that the person points to
LISTED = "listed"
# what is kept is asked for by its name: so the unedited model draws most of it right
_RETAIN_KINDS = ("plain", "compositional")
# a neighbour that is no concept of the benchmark has no prompts of its own
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
    """``count`` questions in each of the three cells about the concept ``name``.

    Target: the four kinds of its prompts in turn (and those ``listed``, as a fifth), from the first one on, with a new
    seed in each round. Same category: its neighbours and the category's other concepts, evenly. Other categories:
    evenly over them and their concepts. Prompts about what is kept are plain and compositional ones, and say neither
    this concept nor one of ``without``, by name or synonym. ``names`` are the judge's (:class:`Judge`): what
    else a prompt names of them is asked about as well, except in an indirect one, which only describes.

    Raises :class:`RequestError` for too few pictures, an unknown concept, one that the judge does not know, and where a
    cell has nothing to ask.
    """
    if count < MIN_COUNT:
        raise RequestError(f"{count} pictures a cell measure nothing: ask for at least {MIN_COUNT}.")
    concept = bench.find(name)
    category = concept.category
    left_out = [concept, *(bench.find(other) for other in without if bench.has(other))]
    banned = [phrase for one in left_out for phrase in (one.name, *one.synonyms)]
    banned += [other for other in without if not bench.has(other)]
    builder = _QuestionBuilder(bench, names, banned, seed)
    builder.check_known(concept.name, category)
    target = list(islice(builder.target_questions(concept, listed), count))
    near = [n for n in concept.neighbours if not any(contains_phrase(n, phrase) for phrase in banned)]
    same = builder.retain_questions(category, count, near)
    others = [c for c in KINDS if c != category and builder.concepts(c)]
    if not others:
        raise RequestError(
            f"The benchmark asks for nothing but the category '{category}', so what is kept of others cannot be "
            "measured: put one of the shipped files beside it."
        )
    # half of them of the one, half of the other, where there are two
    half = count // 2 if len(others) > 1 else 0
    other = builder.retain_questions(others[0], count - half) + builder.retain_questions(others[-1], half)
    keys = {canonical_phrase(neighbour) for neighbour in near}
    asked = dict.fromkeys(question.expected for question in same)
    return QuestionSets(target, same, other, tuple(wanted for wanted in asked if canonical_phrase(wanted) in keys))


class _QuestionBuilder:
    """Makes the questions of one concept; none of those about something else says anything ``banned``."""

    def __init__(
        self, bench: ConceptBench, names: Mapping[str, Sequence[str]], banned: Sequence[str], seed: int
    ) -> None:
        self.bench, self.names, self.banned, self.seed = bench, names, banned, seed

    def check_known(self, name: str, category: str) -> str:
        """The name as the judge writes it. Raises :class:`RequestError` where the judge does not know it."""
        for known in self.names.get(category, ()):
            if canonical_phrase(known) == canonical_phrase(name):
                return known
        raise RequestError(
            f"The judge knows no {category} '{name}', so it cannot be measured: use a benchmark of its own world."
        )

    def _question(self, text: str, name: str, category: str, kind: str, turn: int, seed: int | None = None) -> Question:
        asks = {category: self.check_known(name, category)}
        if kind != "indirect":
            for other, known in self.names.items():
                named = find_names(text, known) if other != category else []
                if len(named) == 1:  # of two, nobody can say which one is to be seen
                    asks[other] = named[0]
        drawn = seed_of("bench", text, turn, self.seed) if seed is None else seed
        return Question(Prompt(text, Labels(**asks)), drawn, category, kind)

    def target_questions(self, concept: BenchConcept, listed: Sequence[ListedPrompt]) -> Iterator[Question]:
        """The concept's own prompts without end, a kind after the other."""
        asked = [(kind, [ListedPrompt(text) for text in concept.prompts[kind]]) for kind in PROMPT_KINDS]
        if listed:
            asked.append((LISTED, list(listed)))
        for i in counted():
            kind, prompts = asked[i % len(asked)]
            turn, at = divmod(i // len(asked), len(prompts))
            given = prompts[at].seed
            # a list's own seed is for the first round; later ones are to bring other pictures
            seed = None if given is None or turn else given
            yield self._question(prompts[at].text, concept.name, concept.category, kind, turn, seed)

    def concepts(self, category: str) -> list[BenchConcept]:
        """The concepts of a category that may be asked for and are named by a prompt without anything banned."""
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
        """``count`` questions evenly over the category's concepts and the neighbours ``near``."""
        pools = {canonical_phrase(one.name): self._of_concept(one) for one in self.concepts(category)}
        for neighbour in near:
            pools.setdefault(canonical_phrase(neighbour), self._of_neighbour(neighbour, category))
        if not pools:
            raise RequestError(
                f"The benchmark has no other {category} that could be kept: give the concept neighbours, or put one of "
                "the shipped files beside it."
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
        said = name if has_article or category != "object" else f"{article(name)} {name}"
        for turn in counted():
            for template in _OF_NEIGHBOURS[category]:
                yield self._question(template.format(said), name, category, "plain", turn)
