"""ConceptBench: concepts to forget, each with plain, compositional, paraphrased and indirect prompts.

The categories and the idea are those of Forget-Me-Not (arXiv 2303.17591), whose lists were not released; the files here
are this project's own. One covers the embedded model's world, the other checkpoints. User files (for example of public
figures) have the same format, ``data/bench.schema.json``, and can be combined with either.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from ...errors import RequestError, listed
from ...files.json_text import parse_json
from ...files.reading import read_text
from ...request.concept import KINDS, Concept, canonical_phrase

__all__ = [
    "BENCHES",
    "PROMPT_KINDS",
    "SCHEMA_PATH",
    "SCHEMA_VERSION",
    "BenchConcept",
    "ConceptBench",
    "contains_phrase",
    "find_names",
    "load_bench",
]

SCHEMA_VERSION = 1
_DATA = Path(__file__).with_name("data")
SCHEMA_PATH = _DATA / "bench.schema.json"
PROMPT_KINDS = ("plain", "compositional", "paraphrased", "indirect")
BENCHES = {"embedded": _DATA / "embedded.json", "checkpoints": _DATA / "checkpoints.json"}
_FIELDS = ("schema", "name", "licence", "description", "concepts")
_CONCEPT_FIELDS = ("name", "category", "died", "synonyms", "replacement", "neighbours", "prompts")
_YEARS = (-4000, 9999)
# shorter words of a name ("van", "the") are not specific to it
_OWN_WORD = 4


@dataclass(frozen=True)
class BenchConcept:
    """A concept of a benchmark.

    Attributes:
        name: Name of the concept.
        category: ``"object"``, ``"style"`` or ``"identity"``.
        prompts: Prompts by kind; see :data:`PROMPT_KINDS`.
        synonyms: Other words for it.
        replacement: Anchor concept; ``None`` for the default of its kind.
        neighbours: Similar concepts that belong to the retain set.
        died: Year of death of a real person; ``None`` otherwise.
    """

    name: str
    category: str
    prompts: Mapping[str, tuple[str, ...]]
    synonyms: tuple[str, ...] = ()
    replacement: str | None = None
    neighbours: tuple[str, ...] = ()
    died: int | None = None

    @property
    def concept(self) -> Concept:
        """The concept as it appears in a request."""
        return Concept(self.name, self.category, self.replacement)

    def as_dict(self) -> dict[str, object]:
        """As in a file."""
        return {
            "name": self.name,
            "category": self.category,
            **({} if self.died is None else {"died": self.died}),
            "synonyms": list(self.synonyms),
            "replacement": self.replacement,
            "neighbours": list(self.neighbours),
            "prompts": {kind: list(self.prompts[kind]) for kind in PROMPT_KINDS},
        }


@dataclass(frozen=True)
class ConceptBench:
    """A list of uniquely named concepts and its licence."""

    name: str
    licence: str
    concepts: tuple[BenchConcept, ...]
    description: str = ""
    _by_name: Mapping[str, BenchConcept] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name: dict[str, BenchConcept] = {}
        for concept in self.concepts:
            if (key := canonical_phrase(concept.name)) in by_name:
                raise RequestError(f"The concept '{concept.name}' is in the benchmark twice: leave one of them out.")
            by_name[key] = concept
        object.__setattr__(self, "_by_name", by_name)

    def find(self, name: str) -> BenchConcept:
        """Return the concept with this name, ignoring case and articles.

        Raises:
            RequestError: If there is none; the message lists the existing concepts.
        """
        if (found := self._by_name.get(canonical_phrase(name))) is None:
            known = listed([concept.name for concept in self.concepts], 40)
            raise RequestError(f"'{self.name}' has no concept '{name}': choose one of {known}.")
        return found

    def has(self, name: str) -> bool:
        """Return whether there is a concept with this name, ignoring case and articles."""
        return canonical_phrase(name) in self._by_name

    def names(self) -> dict[str, tuple[str, ...]]:
        """Return all names by category: the concepts, then the neighbours that are not concepts themselves."""
        found: dict[str, dict[str, str]] = {category: {} for category in KINDS}
        for concept in self.concepts:
            found[concept.category].setdefault(canonical_phrase(concept.name), concept.name)
        for concept in self.concepts:
            for neighbour in concept.neighbours:
                found[concept.category].setdefault(canonical_phrase(neighbour), neighbour)
        return {category: tuple(names.values()) for category, names in found.items() if names}

    def joined(self, other: ConceptBench) -> ConceptBench:
        """Combine two benchmarks.

        Raises:
            RequestError: If a concept is in both.
        """
        licences = dict.fromkeys((self.licence, other.licence))
        return replace(
            self,
            name=f"{self.name} + {other.name}",
            licence=", ".join(licences),
            concepts=(*self.concepts, *other.concepts),
        )

    def as_dict(self) -> dict[str, object]:
        """Return the file format; :meth:`from_json` is the inverse."""
        return {
            "schema": SCHEMA_VERSION,
            "name": self.name,
            "licence": self.licence,
            "description": self.description,
            "concepts": [concept.as_dict() for concept in self.concepts],
        }

    def digest(self) -> str:
        """Hash of the content, which distinguishes results of different benchmarks."""
        return hashlib.sha256(json.dumps(self.as_dict(), ensure_ascii=False).encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, text: str) -> ConceptBench:
        """Parse a benchmark, and validate it against ``bench.schema.json`` and these rules.

        No duplicate concepts or prompts; plain and compositional prompts contain the name; paraphrased prompts contain
        a synonym and not the name; indirect prompts contain no synonym and no word of the name; neighbours and
        replacement differ from the concept itself.

        Raises:
            RequestError: If the text is invalid; the message names the concept and the field.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise RequestError(f"The benchmark is not valid JSON: {error}.") from error
        for problem in _problems(data):
            raise RequestError(problem)
        concepts = tuple(
            BenchConcept(
                entry["name"],
                entry["category"],
                {kind: tuple(entry["prompts"][kind]) for kind in PROMPT_KINDS},
                tuple(entry.get("synonyms", ())),
                entry.get("replacement"),
                tuple(entry.get("neighbours", ())),
                None if entry.get("died") is None else int(entry["died"]),
            )
            for entry in data["concepts"]
        )
        for concept in concepts:
            for problem in _contradictions(concept):
                raise RequestError(problem)
        return cls(data["name"], data["licence"], concepts, data.get("description", ""))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ConceptBench:
        """Read a UTF-8 JSON file.

        Raises:
            RequestError: If the file cannot be read or is invalid; the message names it.
        """
        text = read_text(path, "The benchmark file", RequestError)
        try:
            return cls.from_json(text)
        except RequestError as error:
            raise RequestError(f"In the benchmark file '{path}': {error}") from error


def load_bench(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> ConceptBench:
    """Load and combine benchmarks.

    Args:
        source: ``"embedded"``, ``"checkpoints"`` or a file, or several of them.

    Raises:
        RequestError: If a file cannot be read, or a concept is in two benchmarks.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    if not sources:
        raise RequestError(f"There is no benchmark: give {' or '.join(BENCHES)} or a file.")
    read = [ConceptBench.from_file(BENCHES.get(str(one), Path(one))) for one in sources]
    whole = read[0]
    for more in read[1:]:
        whole = whole.joined(more)
    return whole


# -- words in a prompt --------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _pattern(phrase: str) -> re.Pattern[str]:
    words = r"\s+".join(re.escape(word) for word in unicodedata.normalize("NFC", phrase).split())
    # letters and digits make words; a plural names it too
    return re.compile(rf"(?<![^\W_]){words}(?:e?s)?(?![^\W_])", re.IGNORECASE)


def contains_phrase(prompt: str, phrase: str) -> bool:
    """Return whether a prompt contains the phrase as whole words, ignoring case and a plural *s* or *es*."""
    return bool(phrase.split()) and _pattern(phrase).search(unicodedata.normalize("NFC", prompt)) is not None


def find_names(prompt: str, names: Iterable[str]) -> list[str]:
    """Return the names that the prompt contains, except names that occur only inside a longer one."""
    prompt = unicodedata.normalize("NFC", prompt)
    found = [(match.span(), name) for name in names for match in _pattern(name).finditer(prompt)]
    whole = [
        name
        for (start, end), name in found
        if not any(a <= start and end <= b and (a, b) != (start, end) for (a, b), _ in found)
    ]
    return list(dict.fromkeys(whole))


# -- the same rules as bench.schema.json (a test checks that they agree) ------------------------------------------


def _problems(data: object) -> Iterator[str]:
    if not isinstance(data, dict):
        yield f"The benchmark must be a JSON object with the fields {', '.join(_FIELDS)}."
        return
    yield from _unknown(data, _FIELDS, "The benchmark")
    for key in ("schema", "name", "licence", "concepts"):
        if key not in data:
            yield f"The benchmark lacks the field '{key}'."
            return
    if not _is_whole(data["schema"]) or data["schema"] != SCHEMA_VERSION:
        yield f"The benchmark has schema {data['schema']!r}; this version reads schema {SCHEMA_VERSION}."
    for key in ("name", "licence"):
        if not _is_words(data[key]):
            yield f"The benchmark's '{key}' must be words, not {data[key]!r}."
    if not isinstance(data.get("description", ""), str):
        yield f"The benchmark's 'description' must be words, not {data['description']!r}."
    if not isinstance(data["concepts"], list) or not data["concepts"]:
        yield "The benchmark is empty: 'concepts' must be a list of at least one concept."
        return
    for number, concept in enumerate(data["concepts"], 1):
        yield from _concept_problems(concept, number)


def _concept_problems(concept: object, number: int) -> Iterator[str]:
    if not isinstance(concept, dict):
        yield f"Concept {number} must be an object with a name, a category and prompts, not {concept!r}."
        return
    name = concept.get("name")
    if not _is_words(name):
        yield f"Concept {number} has no name: 'name' must be words."
        return
    yield from _unknown(concept, _CONCEPT_FIELDS, f"The concept '{name}'")
    for key in ("category", "prompts"):
        if key not in concept:
            yield f"The concept '{name}' lacks the field '{key}'."
            return
    if concept["category"] not in KINDS:
        yield (
            f"The concept '{name}' has the unknown category {concept['category']!r}: choose one of {', '.join(KINDS)}."
        )
    if "died" in concept and not (_is_whole(concept["died"]) and _YEARS[0] <= concept["died"] <= _YEARS[1]):
        yield f"In the concept '{name}' 'died' must be a year, not {concept['died']!r}."
    for key in ("synonyms", "neighbours"):
        words = concept.get(key, [])
        if not isinstance(words, list) or not all(map(_is_words, words)):
            yield f"The {key} of '{name}' must be a list of words, not {words!r}."
    if not isinstance(concept.get("replacement"), (str, type(None))):
        yield f"The replacement of '{name}' must be words, not {concept['replacement']!r}."
    prompts = concept["prompts"]
    if not isinstance(prompts, dict):
        yield f"The prompts of '{name}' must be an object with {', '.join(PROMPT_KINDS)}."
        return
    yield from _unknown(prompts, PROMPT_KINDS, f"The prompts of '{name}'")
    for kind in PROMPT_KINDS:
        texts = prompts.get(kind)
        if not isinstance(texts, list) or not texts:
            yield f"The concept '{name}' has no {kind} prompts: '{kind}' must be a list of at least one prompt."
        elif not all(map(_is_words, texts)):
            yield f"One of the {kind} prompts of '{name}' is empty or not text."


def _unknown(data: Mapping[str, object], known: Sequence[str], what: str) -> Iterator[str]:
    for key in data:
        if key not in known:
            have = "have" if " prompts " in what else "has"
            yield f"{what} {have} an unknown field '{key}': the fields are {', '.join(known)}."


def _is_words(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_whole(value: object) -> bool:
    # JSON has a single number type: 1.0 is an integer to a schema
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15 and value == int(value)


def _contradictions(concept: BenchConcept) -> Iterator[str]:
    """Yield violations of the rules that the schema cannot express."""
    name, own = concept.name, canonical_phrase(concept.name)
    if concept.replacement is not None and canonical_phrase(concept.replacement) == own:
        yield f"The replacement of '{name}' is the concept itself: choose another one, or none."
    near = [canonical_phrase(neighbour) for neighbour in concept.neighbours]
    for neighbour, key in zip(concept.neighbours, near, strict=True):
        if key == own:
            yield f"'{name}' is one of its own neighbours, which belong to the retain set: remove it from them."
        if near.count(key) > 1:
            yield f"'{neighbour}' is listed twice in the neighbours of '{name}': remove one of them."
    prompts = [prompt for kind in PROMPT_KINDS for prompt in concept.prompts[kind]]
    for prompt in prompts:
        if prompts.count(prompt) > 1:
            yield f"The concept '{name}' has the prompt '{prompt}' twice: leave one of them out."
    for kind in ("plain", "compositional"):
        for prompt in concept.prompts[kind]:
            if not contains_phrase(prompt, name):
                yield f"The {kind} prompt '{prompt}' does not contain the name '{name}': move it to another kind."
    for prompt in concept.prompts["paraphrased"]:
        if contains_phrase(prompt, name):
            yield f"The paraphrased prompt '{prompt}' contains the name '{name}': move it to another kind."
        if not any(contains_phrase(prompt, synonym) for synonym in concept.synonyms):
            yield f"The paraphrased prompt '{prompt}' contains no synonym of '{name}': list the synonym it uses."
    words = [word for word in re.findall(r"[^\W_]+", name) if len(word) >= _OWN_WORD]
    for prompt in concept.prompts["indirect"]:
        for word in (name, *words, *concept.synonyms):
            if contains_phrase(prompt, word):
                yield f"The indirect prompt '{prompt}' of '{name}' contains '{word}': remove it or change the kind."
