"""Diverse prompts: different, paired word for word, train and test disjoint, a person's own lists checked."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forget_concept.core.errors import RequestError
from forget_concept.core.mini import vocabulary
from forget_concept.core.prompts.pairs import (
    GRAMMAR_PATH,
    GRAMMARS,
    SPLITS,
    PromptPair,
    _pairs,
    given_pairs,
    mentions,
    prompt_pairs,
)
from forget_concept.core.request.concept import KINDS, Concept

NAMES = {"object": "umbrella", "style": "oil painting", "identity": "Lena Frost"}
AUTHORS = 800  # prompts in arXiv 2412.07808
# words that carry no content of their own; every other word belongs to one list only
SMALL = {"a", "an", "the", "in", "on", "at", "of", "for", "its"}
GRAMMAR = json.loads(GRAMMAR_PATH.read_text(encoding="utf-8"))


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def every_pair(kind: str, grammar: str, split: str, name: str | None = None) -> list[PromptPair]:
    """All of them, but for the first tenth or so of what the general grammar has for training."""
    found = _pairs(Concept(name or NAMES[kind], kind), 0, split, grammar, ())
    return list(itertools.islice(found, 6000))


@pytest.fixture(scope="module")
def everything() -> dict[tuple[str, str, str], list[PromptPair]]:
    return {(k, g, s): every_pair(k, g, s) for k in KINDS for g in GRAMMARS for s in SPLITS}


# -- train and test -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_no_word_of_a_train_list_is_in_a_test_list(grammar):
    lists = GRAMMAR[grammar]["dimensions"].values()
    found = {split: {w for both in lists for entry in both[split] for w in words(entry)} - SMALL for split in SPLITS}
    assert found["train"]
    assert found["test"]
    assert not found["train"] & found["test"]


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_a_test_prompt_shares_only_its_frame_with_training(grammar, everything):
    for kind in KINDS:
        frames = {w for pattern in GRAMMAR[grammar][kind]["patterns"] for w in words(pattern)}
        frames |= set(words(GRAMMAR[grammar][kind].get("subject", ""))) | set(words(NAMES[kind]))
        said = {split: {w for pair in everything[kind, grammar, split] for w in words(pair.forget)} for split in SPLITS}
        assert said["train"] & said["test"] <= frames | SMALL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grammar", GRAMMARS)
def test_no_prompt_is_in_both_splits(kind, grammar, everything):
    train, test = everything[kind, grammar, "train"], everything[kind, grammar, "test"]
    assert not {pair.forget for pair in train} & {pair.forget for pair in test}
    shared = {pair.retain for pair in train} & {pair.retain for pair in test}
    # where nothing but the concept was said, nothing is left that could differ
    assert not shared


# -- enough, and different ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_more_pairs_than_the_authors_had_prompts(kind, everything):
    for split in SPLITS:
        assert len(everything[kind, "general", split]) >= AUTHORS


def test_no_forget_prompt_comes_twice(everything):
    for key, pairs in everything.items():
        assert len({pair.forget for pair in pairs}) == len(pairs), key
        if key[1] == "general":  # there every retain prompt is its own too
            assert len({pair.retain for pair in pairs}) == len(pairs), key


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_and_words_take_turns(kind):
    """In 600 pairs each of 6 patterns is used 100 times, and no word of a dimension half as often as another."""
    pairs = prompt_pairs(Concept(NAMES[kind], kind), 600, 3)
    tail = {"object": "company", "style": "company", "identity": "activity"}[kind]
    for dimension in ("mood", "place", "time", tail):
        entries = GRAMMAR["general"]["dimensions"][dimension]["train"]
        counts = Counter(entry for pair in pairs for entry in entries if entry in pair.retain)
        assert sum(counts.values()) == 600
        assert min(counts[entry] for entry in entries) > 0.5 * max(counts.values())


@given(st.integers(1, 60), st.integers(0, 2**63), st.sampled_from(KINDS), st.sampled_from(GRAMMARS))
def test_fewer_are_the_first_of_more_and_a_seed_is_a_seed(count, seed, kind, grammar):
    concept = Concept(NAMES[kind], kind)
    pairs = prompt_pairs(concept, 60, seed, "test", grammar)
    assert prompt_pairs(concept, count, seed, "test", grammar) == pairs[:count]
    assert prompt_pairs(concept, 60, seed + 1, "test", grammar) != pairs


# -- paired -------------------------------------------------------------------------------------------------------

NAME = st.lists(st.text(st.sampled_from("abefghinorstuxyz"), min_size=2, max_size=9), min_size=1, max_size=3).map(
    " ".join
)


@given(NAME, st.integers(0, 1000), st.sampled_from(KINDS), st.sampled_from(GRAMMARS), st.sampled_from(SPLITS))
def test_the_retain_prompt_is_the_forget_prompt_without_the_concept(name, seed, kind, grammar, split):
    """Every word of it stands in the forget prompt, in the same order, but for an article or "something" in place."""
    for pair in prompt_pairs(Concept(name, kind), 20, seed, split, grammar):
        assert f" {name} " in re.sub(r"[,:]", " ", f" {pair.forget} ")
        assert not mentions(name, pair.retain)
        said = iter(words(pair.forget))
        fillers = {"a", "an", "something"}
        assert all(word in said for word in words(pair.retain) if word not in fillers)
        assert len(words(pair.retain)) < len(words(pair.forget)) or "something" in pair.retain


def test_both_prompts_are_clean_sentences(everything):
    for pairs in everything.values():
        for prompt in (text for pair in pairs[:2000] for text in (pair.forget, pair.retain)):
            assert prompt
            assert prompt == " ".join(prompt.split())
            assert not re.search(r"[][{}|()]| [,:.]|[,:] *[,:]|^[,:]|[,:]$", prompt)
            first, *rest = words(prompt)
            # an article stands before a word that takes it, and nothing ends on one
            for article, word in zip([first, *rest], rest, strict=False):
                if article in ("a", "an"):
                    assert (article == "an") == (word[0] in "aeiou"), prompt
            assert [first, *rest][-1] not in SMALL - {"its"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("umbrella", "an umbrella"),
        ("unicorn", "a unicorn"),
        ("hourglass", "an hourglass"),
        ("SUV", "an SUV"),
        ("UFO", "a UFO"),
        ("X-ray", "an X-ray"),
        ("the Eiffel Tower", "the Eiffel Tower"),
        ("a star", "a star"),
        ("some snow", "some snow"),
    ],
)
def test_articles(name, said):
    for pair in prompt_pairs(Concept(name), 30, 0):
        assert re.search(rf"(^|\s){said}\b", pair.forget)
        assert not re.search(rf"\b(a|an|the) {said}\b", pair.forget)


@pytest.mark.parametrize("name", ["beach", "two friends", "Photo", "dogs", "the night", "mood"])
def test_what_the_grammar_itself_says_of_the_concept_is_left_out(name):
    for split in SPLITS:
        pairs = prompt_pairs(Concept(name), 500, 0, split)
        assert not [pair.retain for pair in pairs if mentions(name, pair.retain)]


def test_other_targets_are_named_in_no_prompt():
    pairs = prompt_pairs(Concept("neon", "style"), 400, 0, grammar="embedded", without=("Star", "mira vale", "red"))
    said = {word for pair in pairs for word in words(pair.forget)}
    assert not {"star", "mira", "red"} & said
    assert {"moon", "otto", "blue"} <= said


def test_the_embedded_grammar_speaks_only_known_words():
    known = set()
    for category in vocabulary.CATEGORIES.values():
        for word in category:
            known.update(words(f"{word.name} {word.synonym} {word.description} {word.article}"))
    for texts in (
        vocabulary.TEMPLATES_STYLED,
        vocabulary.TEMPLATES_PLAIN,
        vocabulary.TEMPLATES_STYLE_ONLY,
        vocabulary.TEMPLATES_BACKGROUND,
    ):
        known.update(word for text in texts for word in words(re.sub(r"\{\w*\}", " ", text)))
    known |= {"an", *vocabulary.COLOURS, *vocabulary.BACKGROUNDS, *vocabulary.ATTRIBUTES}
    for kind, category in vocabulary.CATEGORIES.items():
        for split in SPLITS:
            pairs = every_pair(kind, "embedded", split, category[0].name)
            assert {word for pair in pairs for word in words(f"{pair.forget} {pair.retain}")} <= known


def test_every_word_of_the_embedded_grammar_is_the_worlds():
    lists = {name: {*both["train"], *both["test"]} for name, both in GRAMMAR["embedded"]["dimensions"].items()}
    assert lists == {
        "colour": set(vocabulary.COLOURS),
        "style": {w.name for w in vocabulary.STYLES},
        "background": set(vocabulary.BACKGROUNDS),
        "object": {w.name for w in vocabulary.OBJECTS},
        "person": {w.name for w in vocabulary.IDENTITIES},
        "attribute": set(vocabulary.ATTRIBUTES),
    }


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_grammar_that_is_used_up_says_how_many_it_has(kind, split, everything):
    concept, there = Concept(NAMES[kind], kind), len(everything[kind, "embedded", split])
    assert len(prompt_pairs(concept, there, 5, split, "embedded")) == there
    with pytest.raises(RequestError, match=f"has {there} {split} prompt pairs about '{concept.name}'"):
        prompt_pairs(concept, there + 1, 5, split, "embedded")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 0}, "at least 1, not 0"),
        ({"split": "dev"}, "'dev' is not known: choose one of train, test"),
        ({"grammar": "latin"}, "'latin' is not known"),
        ({"concept": Concept("star", "thing")}, "'thing' is not known"),
        ({"concept": Concept("  ")}, "has no name"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, said):
    with pytest.raises(RequestError, match=said):
        prompt_pairs(**{"concept": Concept("star"), "count": 5, "seed": 0} | changes)


# -- one's own lists ----------------------------------------------------------------------------------------------


def test_given_lists_become_pairs_in_their_order():
    forget, retain = ["a red star", "Two STARS at night"], ["a red heart", "two starfish"]
    assert given_pairs(forget, retain, Concept("star")) == [
        PromptPair("a red star", "a red heart"),
        PromptPair("Two STARS at night", "two starfish"),
    ]
    both = (Concept("star"), Concept("neon", "style"))
    assert len(given_pairs(["a star", "a neon house"], ["a heart", "a house"], both)) == 2


@pytest.mark.parametrize(
    ("forget", "retain", "said"),
    [
        ([], [], "no forget and no retain prompts"),
        (["a star"], [], "1 forget prompts and 0 retain prompts"),
        (["a star", "the star"], ["a heart"], "2 forget prompts and 1 retain prompts"),
        (["a star", " "], ["a heart", "a cup"], "forget prompt number 2 is empty"),
        (["a star"], [""], "retain prompt number 1 is empty"),
        (["a heart"], ["a cup"], "'a heart' does not name 'star'"),
        (["starry skies"], ["skies"], "does not name 'star'"),
        (["a star"], ["two  Stars"], "names 'star', which is to be forgotten"),
        (["a star", "A  Star"], ["a heart", "a cup"], "given twice"),
        (["a star", "a star and a cup"], ["a cup", "A star"], "is on both lists"),
        ("a star", ["a cup"], "must be a list"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused_in_words(forget, retain, said):
    with pytest.raises(RequestError, match=said):
        given_pairs(forget, retain, Concept("star"))


def test_no_concept_no_prompts():
    with pytest.raises(RequestError, match="no concept"):
        given_pairs(["a star"], ["a cup"], ())


@pytest.mark.parametrize(
    ("name", "prompt", "there"),
    [
        ("Van Gogh", "van  gogh's room", True),
        ("Van Gogh", "a van by Gogh", False),
        ("the moon", "moonlight", False),
        ("the moon", "a full moon.", True),
        ("stained glass", "a stained-glass window", True),
        ("boxes", "one box", True),
        ("猫", "一只猫在睡觉", True),
        ("猫", "一只狗", False),
        ("c++", "a C++ book", True),
    ],
)
def test_mentions(name, prompt, there):
    assert mentions(name, prompt) is there


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("caf\u00e9", "a photo of a cafe\u0301"),
        ("cafe\u0301", "a photo of a CAF\u00c9"),
        ("hatsune_miku", "a drawing of Hatsune Miku"),
        ("hatsune miku", "1girl, hatsune_miku, smile"),
        ("saber_(fate)", r"1girl, saber_\(fate\), sword"),
        ("saber (fate)", "1girl, saber_(fate)"),
    ],
)
def test_a_prompt_names_a_concept_in_every_spelling_of_it(name, prompt):
    assert mentions(name, prompt)
