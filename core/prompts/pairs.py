"""Diverse prompts in pairs: a forget prompt that names the concept, and the same prompt without the concept.

*Boosting Alignment for Post-Unlearning Text-to-Image Generative Models* (arXiv 2412.07808) builds forget and retain
sets of many prompts over mood × concept × activity × place × time, so that a model forgets the concept in every
sentence, and no sentence with it. Its authors generate the prompts with a language model; here a grammar
(``grammar.json``) does, without a network and reproducibly for a seed.

A pattern of the grammar contains ``{dimension}`` and ``{concept}``; ``[…]`` is in the forget prompt only; of ``[…|…]``
the first part is in the forget prompt, the second in the retain prompt; ``a(n)`` becomes the article of the next word.
Each dimension has two disjoint lists, so that prompts of ``split="test"`` share only the pattern with those of
``"train"``.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..request.concept import Concept, normalized_phrase, templates

__all__ = ["GRAMMARS", "GRAMMAR_PATH", "SPLITS", "PromptPair", "given_pairs", "mentions", "prompt_pairs"]

GRAMMAR_PATH = Path(__file__).with_name("grammar.json")
GRAMMARS = ("general", "embedded")
SPLITS = ("train", "test")

_FIELD = re.compile(r"\{(\w+)\}")
_OPTION = re.compile(r"\[([^][|]*)(?:\|([^][|]*))?\]")
_ARTICLE = re.compile(r"\ba\(n\) +(\S+)")
_ARTICLES = ("a", "an", "the")
# a name that begins with one of these takes no article from the grammar
_DETERMINERS = frozenset({*_ARTICLES, "some", "my", "your", "his", "her", "its", "our", "their", "this", "that"})
# vowel letters that are pronounced as consonants, silent h, and capitals that are spelled out
_AS_CONSONANT = re.compile(r"uni(?!n|m)|us[aeiu]|ut[ei]|ufo|eu|ew|one\b|once\b", re.IGNORECASE)
_SILENT_H = re.compile(r"hour|honest|honou?r|heir", re.IGNORECASE)
_SPELLED = re.compile(r"[A-Z]{1,3}(?![A-Za-z])")


@dataclass(frozen=True)
class PromptPair:
    """``forget`` names the concept; ``retain`` is the same prompt without it, which must not change."""

    forget: str
    retain: str


def prompt_pairs(
    concept: Concept,
    count: int,
    seed: int,
    split: str = "train",
    grammar: str = "general",
    without: Sequence[str] = (),
) -> list[PromptPair]:
    """Different prompt pairs about a concept; patterns take turns, and the words of a dimension are equally likely.

    A larger ``count`` gives the same pairs first. A singular name takes "a" or "an"; write "the Eiffel Tower" or "some
    snow" for one that does not.

    Args:
        concept: The concept that the forget prompts name; no retain prompt names it.
        count: Number of pairs, at least 1.
        seed: Seed of the order.
        split: ``"train"`` or ``"test"``; their words are disjoint.
        grammar: ``"general"``: everyday English; ``"embedded"``: only words that the embedded models know.
        without: Names that no prompt contains, such as the other concepts of a request.

    Raises:
        RequestError: The kind, split or grammar is unknown, the concept has no name, or the grammar has fewer pairs
            than ``count`` (the message says how many).
    """
    templates(concept.kind)  # raises for an unknown kind
    _choice("split", split, SPLITS)
    _choice("grammar", grammar, GRAMMARS)
    if not normalized_phrase(concept.name):
        raise RequestError("The concept has no name, so no prompt can be made about it.")
    if count < 1:
        raise RequestError(f"The number of prompt pairs must be at least 1, not {count}.")
    found = list(itertools.islice(_pairs(concept, seed, split, grammar, tuple(without)), count))
    if len(found) < count:
        raise RequestError(
            f"The grammar '{grammar}' has {len(found)} {split} prompt pairs about '{concept.name}', fewer than the "
            f"{count} needed: set a lower number, or give your own prompts."
        )
    return found


def given_pairs(forget: Sequence[str], retain: Sequence[str], concept: Concept | Sequence[Concept]) -> list[PromptPair]:
    """Pair a user's own forget and retain prompts, in their order, after checking them.

    Args:
        forget: Prompts that name a concept.
        retain: As many prompts that name none.
        concept: The concept or concepts.

    Raises:
        RequestError: A list or prompt is empty, the lists differ in length, a forget prompt is given twice or names no
            concept, a retain prompt names one, or a prompt is on both lists.
    """
    concepts = (concept,) if isinstance(concept, Concept) else tuple(concept)
    lists = {"forget": forget, "retain": retain}
    for name, prompts in lists.items():
        if isinstance(prompts, str):
            raise RequestError(f"The {name} prompts must be a list, not a single text.")
        for number, prompt in enumerate(prompts, 1):
            if not isinstance(prompt, str) or not prompt.strip():
                raise RequestError(f"The {name} prompt number {number} is empty: write it, or remove it.")
    if not concepts:
        raise RequestError("There is no concept for the prompts: name at least one.")
    if not len(forget) and not len(retain):
        raise RequestError("There are no forget and no retain prompts: give at least one of each.")
    if len(forget) != len(retain):
        raise RequestError(
            f"There are {len(forget)} forget prompts and {len(retain)} retain prompts: give one retain prompt for "
            "each forget prompt."
        )
    seen: set[str] = set()
    retained = {normalized_phrase(prompt) for prompt in retain}
    names = " or ".join(f"'{c.name}'" for c in concepts)
    for prompt in forget:
        if (key := normalized_phrase(prompt)) in retained:
            raise RequestError(f"The prompt '{prompt}' is on both lists: remove it from one of them.")
        if not any(mentions(c.name, prompt) for c in concepts):
            raise RequestError(f"The forget prompt '{prompt}' does not name {names}: name it there, or remove it.")
        if key in seen:
            raise RequestError(f"The forget prompt '{prompt}' is given twice: leave one of them out.")
        seen.add(key)
    for prompt in retain:
        for c in concepts:
            if mentions(c.name, prompt):
                raise RequestError(
                    f"The retain prompt '{prompt}' names '{c.name}', which is to be forgotten: remove the name or the "
                    "prompt."
                )
    return [PromptPair(a, b) for a, b in zip(forget, retain, strict=True)]


def mentions(name: str, prompt: str) -> bool:
    """Whether ``prompt`` contains the words of ``name`` in a row, in any case, without its article, or in plural."""
    return _finder(normalized_phrase(name)).search(normalized_phrase(prompt)) is not None


@lru_cache(maxsize=256)
def _finder(name: str) -> re.Pattern[str]:
    words = re.findall(r"[^\W_]+", name)  # a tag joins its words by underscores
    if len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    if not words or not name.isascii():  # scripts without blanks between words
        return re.compile(r"\s+".join(map(re.escape, name.split(" "))))
    last = words[-1]
    nouns = {last, last + "s", last + "es", re.sub("s$", "", last), re.sub("es$", "", last)} - {""}
    ends = "|".join(sorted(map(re.escape, nouns)))
    return re.compile(r"(?<!\w)" + r"[\W_]+".join([*map(re.escape, words[:-1]), f"(?:{ends})"]) + r"(?!\w)")


def _choice(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise RequestError(f"The {what} '{value}' is not known: choose one of {', '.join(known)}.")


@lru_cache(maxsize=1)
def _grammar() -> dict[str, Any]:
    grammar: dict[str, Any] = json.loads(GRAMMAR_PATH.read_text(encoding="utf-8"))
    return grammar


def _patterns(grammar: str, kind: str) -> list[str]:
    """The patterns of a kind, with ``{subject}``, which most of them share, replaced."""
    rules = _grammar()[grammar][kind]
    return [pattern.replace("{subject}", rules.get("subject", "")) for pattern in rules["patterns"]]


def _pairs(concept: Concept, seed: int, split: str, grammar: str, without: tuple[str, ...]) -> Iterator[PromptPair]:
    """Every pair once, in an order that depends on the seed; patterns take turns until they are exhausted."""
    draws = random.Random(seed)
    patterns = _patterns(grammar, concept.kind)
    draws.shuffle(patterns)
    lists = {name: words[split] for name, words in _grammar()[grammar]["dimensions"].items()}
    sources = [_filled(pattern, lists, concept.name, draws.getrandbits(64)) for pattern in patterns]
    seen: set[PromptPair] = set()
    while sources:
        for source in list(sources):
            for pair in source:
                # the forget prompt is the longer one: a word in both prompts is found there
                clash = mentions(concept.name, pair.retain) or any(mentions(name, pair.forget) for name in without)
                if not clash and pair not in seen:
                    seen.add(pair)
                    yield pair
                    break
            else:
                sources.remove(source)


def _filled(pattern: str, lists: dict[str, list[str]], name: str, seed: int) -> Iterator[PromptPair]:
    """Every way to fill one pattern, in an order that depends on the seed."""
    fields = [field for field in dict.fromkeys(_FIELD.findall(pattern)) if field != "concept"]
    total = math.prod(len(lists[field]) for field in fields)
    forget = _OPTION.sub(lambda option: option[1], pattern)
    retain = _OPTION.sub(lambda option: option[2] or "", pattern)
    for number in _shuffled(total, random.Random(seed)):
        words = {"concept": name.strip()}
        for field in fields:
            number, at = divmod(number, len(lists[field]))
            words[field] = lists[field][at]
        yield PromptPair(_sentence(forget, words), _sentence(retain, words))


def _shuffled(total: int, draws: random.Random) -> Iterator[int]:
    """A lazy Fisher-Yates shuffle of the numbers below ``total``."""
    moved: dict[int, int] = {}
    for at in range(total):
        other = draws.randrange(at, total)
        yield moved.pop(other, other)
        if other != at:
            moved[other] = moved.pop(at, at)


def _sentence(frame: str, words: dict[str, str]) -> str:
    return _ARTICLE.sub(_with_article, _FIELD.sub(lambda field: words[field[1]], frame)).strip()


def _with_article(match: re.Match[str]) -> str:
    word = match[1]
    if word.casefold() in _DETERMINERS:
        return word
    if _SPELLED.match(word):
        vowel = word[0] in "AEFHILMNORSX"
    else:
        vowel = word[0].casefold() in "aeiou" and not _AS_CONSONANT.match(word)
    return f"{'an' if vowel or _SILENT_H.match(word) else 'a'} {word}"
