"""Diverse prompts, in pairs: one that asks for the concept, and the same one without the concept's words.

*Boosting Alignment for Post-Unlearning Text-to-Image Generative Models* (arXiv 2412.07808) makes forget and retain sets
of many prompts over mood × concept × activity × place × time, so that a model neither forgets a concept in one sentence
only nor, with it, the sentence. Its authors had a language model write them; here a grammar does
(``grammar.json``), without a network and the same for a seed everywhere.

A pattern of the grammar holds ``{dimension}`` and ``{concept}``; ``[…]`` is what only the forget prompt says, ``[…|…]``
what the forget prompt says and what the retain prompt says instead; ``a(n)`` becomes the article of the word after it.
Each dimension has two lists without a word in common: prompts of ``split="test"`` say nothing those of ``"train"`` say
but the frame around it.
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
# a name that brings one of these along takes no article from the grammar
_DETERMINERS = frozenset({*_ARTICLES, "some", "my", "your", "his", "her", "its", "our", "their", "this", "that"})
# vowel letters that begin with a consonant's sound, silent h, and capitals that are spelled out
_AS_CONSONANT = re.compile(r"uni(?!n|m)|us[aeiu]|ut[ei]|ufo|eu|ew|one\b|once\b", re.IGNORECASE)
_SILENT_H = re.compile(r"hour|honest|honou?r|heir", re.IGNORECASE)
_SPELLED = re.compile(r"[A-Z]{1,3}(?![A-Za-z])")


@dataclass(frozen=True)
class PromptPair:
    """``forget`` asks for the concept; ``retain`` is the same prompt without it, and stays as it is."""

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
    """``count`` different pairs about a concept, its patterns in turn, each word of a dimension as likely as another.

    ``grammar="general"`` is everyday English, for models of any size; ``"embedded"`` speaks only words that the
    embedded model was trained on. No retain prompt names the concept, and no prompt names anything in ``without`` (the
    other targets of a request, say): what the grammar would say of it is left out. The same pairs come first whatever
    the count. A singular name takes "a" or "an"; write "the Eiffel Tower" or "some snow" for one that does not.

    Raises :class:`RequestError` for an unknown kind, split or grammar, a name without words, and where the grammar has
    fewer pairs than are asked for, saying how many.
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
            f"{count} asked for: ask for fewer, or give your own prompts."
        )
    return found


def given_pairs(forget: Sequence[str], retain: Sequence[str], concept: Concept | Sequence[Concept]) -> list[PromptPair]:
    """A person's own prompts as pairs, the first with the first and so on, after a check that they can be meant.

    Raises :class:`RequestError`, in a sentence, for empty lists or prompts, lists of different length, a forget prompt
    that is given twice or names no concept, a retain prompt that names one, and a prompt on both lists.
    """
    concepts = (concept,) if isinstance(concept, Concept) else tuple(concept)
    lists = {"forget": forget, "retain": retain}
    for name, prompts in lists.items():
        if isinstance(prompts, str):
            raise RequestError(f"The {name} prompts must be a list, not a single text.")
        for number, prompt in enumerate(prompts, 1):
            if not isinstance(prompt, str) or not prompt.strip():
                raise RequestError(f"The {name} prompt number {number} is empty: write it, or take it out.")
    if not concepts:
        raise RequestError("There is no concept that the prompts could be about: name at least one.")
    if not len(forget) and not len(retain):
        raise RequestError("There are no forget and no retain prompts: give at least one of each.")
    if len(forget) != len(retain):
        raise RequestError(
            f"There are {len(forget)} forget prompts and {len(retain)} retain prompts: give one retain prompt for "
            "each forget prompt."
        )
    seen: set[str] = set()
    kept = {normalized_phrase(prompt) for prompt in retain}
    names = " or ".join(f"'{c.name}'" for c in concepts)
    for prompt in forget:
        if (key := normalized_phrase(prompt)) in kept:
            raise RequestError(f"The prompt '{prompt}' is both to be forgotten and retained: take it from one list.")
        if not any(mentions(c.name, prompt) for c in concepts):
            raise RequestError(f"The forget prompt '{prompt}' does not name {names}: name it there, or take it out.")
        if key in seen:
            raise RequestError(f"The forget prompt '{prompt}' is given twice: leave one of them out.")
        seen.add(key)
    for prompt in retain:
        for c in concepts:
            if mentions(c.name, prompt):
                raise RequestError(
                    f"The retain prompt '{prompt}' names '{c.name}', which is to be forgotten: take the name out, or "
                    "the prompt."
                )
    return [PromptPair(a, b) for a, b in zip(forget, retain, strict=True)]


def mentions(name: str, prompt: str) -> bool:
    """Whether ``prompt`` says ``name``: its words in a row, in any case, without a leading article, or their plural."""
    return _finder(name).search(prompt.casefold()) is not None


@lru_cache(maxsize=256)
def _finder(name: str) -> re.Pattern[str]:
    words = re.findall(r"\w+", name.casefold())
    if len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    if not words or not name.isascii():  # scripts that put no blanks between words
        return re.compile(r"\s+".join(map(re.escape, normalized_phrase(name).split(" "))))
    last = words[-1]
    nouns = {last, last + "s", last + "es", re.sub("s$", "", last), re.sub("es$", "", last)} - {""}
    ends = "|".join(sorted(map(re.escape, nouns)))
    return re.compile(r"(?<!\w)" + r"\W+".join([*map(re.escape, words[:-1]), f"(?:{ends})"]) + r"(?!\w)")


def _choice(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise RequestError(f"The {what} '{value}' is not known: choose one of {', '.join(known)}.")


@lru_cache(maxsize=1)
def _grammar() -> dict[str, Any]:
    grammar: dict[str, Any] = json.loads(GRAMMAR_PATH.read_text(encoding="utf-8"))
    return grammar


def _patterns(grammar: str, kind: str) -> list[str]:
    """The patterns of a kind with ``{subject}``, what most of them share, put in."""
    said = _grammar()[grammar][kind]
    return [pattern.replace("{subject}", said.get("subject", "")) for pattern in said["patterns"]]


def _pairs(concept: Concept, seed: int, split: str, grammar: str, without: tuple[str, ...]) -> Iterator[PromptPair]:
    """Every pair once, in an order of the seed: the patterns take turns until they have no more."""
    draws = random.Random(seed)
    patterns = _patterns(grammar, concept.kind)
    draws.shuffle(patterns)
    lists = {name: words[split] for name, words in _grammar()[grammar]["dimensions"].items()}
    sources = [_filled(pattern, lists, concept.name, draws.getrandbits(64)) for pattern in patterns]
    seen: set[PromptPair] = set()
    while sources:
        for source in list(sources):
            for pair in source:
                # what is left out of both prompts need only be looked for in the longer one
                clash = mentions(concept.name, pair.retain) or any(mentions(name, pair.forget) for name in without)
                if not clash and pair not in seen:
                    seen.add(pair)
                    yield pair
                    break
            else:
                sources.remove(source)


def _filled(pattern: str, lists: dict[str, list[str]], name: str, seed: int) -> Iterator[PromptPair]:
    """Every way to fill one pattern, in an order of the seed."""
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
    """The numbers below ``total``, each once, by Fisher and Yates, only as far as they are taken."""
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
