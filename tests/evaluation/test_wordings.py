"""Held-out wordings: every category has each, they name the concept, and no fit uses their words."""

from __future__ import annotations

import json
import re
import string

import pytest

from forget_concept.core.evaluation.questions import CATEGORIES
from forget_concept.core.evaluation.wordings import WORDINGS, plural, typo, wording_questions
from forget_concept.core.mini import vocabulary
from forget_concept.core.prompts.everyday import COMMON, CONTEXTS
from forget_concept.core.prompts.pairs import GRAMMAR_PATH
from forget_concept.core.request.concept import KINDS, templates

OTHERS = {"object": ["moon", "tree"], "style": ["neon", "mosaic"], "identity": ["Mira Vale"]}
# words without a content of their own
FUNCTION_WORDS = frozenset(
    ["a", "an", "the", "in", "of", "with", "not", "is", "as", "for", "on", "and", "or", "to", "at", "by", "s"]
)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", re.sub(r"\{\w*\}", " ", text.lower())))


# words without a content of their own
FUNCTION_WORDS = words("a an the in of with not is as for on and or to at by s")


def texts(value):
    """Every text within a JSON value, except those of a grammar's test split."""
    if isinstance(value, str):
        yield value
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        if key != "test":
            yield from texts(inner)


def test_their_words_are_used_by_no_fit_and_no_other_measurement():
    held_out = {w for of in WORDINGS.values() for found in of.values() for text in found for w in words(text)}
    held_out -= FUNCTION_WORDS
    assert len(held_out) > 40
    fitted = {w for kind in KINDS for text in (*COMMON[kind], *CONTEXTS[kind], *templates(kind)) for w in words(text)}
    fitted |= {w for text in texts(json.loads(GRAMMAR_PATH.read_text(encoding="utf-8"))) for w in words(text)}
    assert not held_out & fitted
    measured = {
        w
        for name in dir(vocabulary)
        if name.startswith("TEMPLATES")
        for text in getattr(vocabulary, name)
        for w in words(text)
    }
    assert not held_out & measured
    names = {w for found in vocabulary.CATEGORIES.values() for word in found for w in words(word.name)}
    assert not held_out & names


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("wording", WORDINGS)
def test_every_category_has_every_wording_with_the_concept_in_it(category, wording):
    for template in WORDINGS[wording][category]:
        fields = {field for _, field, _, _ in string.Formatter().parse(template) if field}
        assert fields & {"name", "a", "names", "typo", "a_typo"}


@pytest.mark.parametrize(("name", "category"), [("crown", "object"), ("comic", "style"), ("Ivy Stone", "identity")])
def test_questions_name_the_concept_and_are_the_same_for_more(name, category):
    found = wording_questions(name, category, 6, 3, OTHERS)
    assert len(found) == 6 * len(WORDINGS)
    for question in found:
        assert question.expected == name and question.category == category
        if question.kind != "typo":
            assert name in question.prompt.text
        else:
            assert name not in question.prompt.text and typo(name) in question.prompt.text
    assert len({question.picture for question in found}) > 5 * len(WORDINGS)
    fewer = wording_questions(name, category, 2, 3, OTHERS)
    for wording in WORDINGS:
        assert [q for q in fewer if q.kind == wording] == [q for q in found if q.kind == wording][:2]
    assert {q.picture for q in wording_questions(name, category, 6, 4, OTHERS)}.isdisjoint(q.picture for q in found)


def test_a_name_with_an_article_keeps_one():
    """ConceptBench has such names; brackets that a prompt escapes are no article."""
    for name, twice in (
        ("the Eiffel Tower", r"\b(the|a|an) (\w+ )?the\b|'s the\b"),
        (r"saber \(fate\)", r"\ba (a|the)\b"),
    ):
        texts_of = [q.prompt.text for q in wording_questions(name, "object", 8, 0, OTHERS)]
        assert not [text for text in texts_of if re.search(twice, text)]
    assert any("a saber" in text for text in texts_of)


def test_no_companion_is_the_concept_itself():
    alone = wording_questions("moon", "object", 8, 0, OTHERS)
    assert not any(q.prompt.text.count("moon") > 1 for q in alone)
    assert all("moon" not in q.prompt.text for q in wording_questions("neon", "style", 8, 0, {"style": ["neon"]}))


@pytest.mark.parametrize(
    ("name", "wrong"), [("crown", "crwon"), ("cup", "cpu"), ("Ivy Stone", "Ivy Stnoe"), ("aab", "aba"), ("aa", "aaa")]
)
def test_a_typo_swaps_two_letters(name, wrong):
    assert typo(name) == wrong
    assert len(name) != len(wrong) or sorted(name) == sorted(wrong)


def test_plurals():
    assert [plural(name) for name in ("star", "fish", "box", "city", "toy")] == [
        *("stars", "fishes", "boxes", "cities", "toys")
    ]
