"""ConceptBench: the shipped files and what they promise, the reader and its schema, the questions and their counts."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter

import pytest
from drawn import labels_named_in
from hypothesis import given
from hypothesis import strategies as st

from forget_concept.core.errors import RequestError
from forget_concept.core.evaluation import ListedPrompt, bench_questions, load_bench, read_prompts
from forget_concept.core.evaluation.bench.concept_bench import (
    BENCHES,
    PROMPT_KINDS,
    SCHEMA_PATH,
    ConceptBench,
    _problems,
    contains_phrase,
    find_names,
)
from forget_concept.core.evaluation.bench.questions import LISTED
from forget_concept.core.evaluation.judges import WorldJudge
from forget_concept.core.mini import vocabulary
from forget_concept.core.mini.world import LABELS
from forget_concept.core.request.concept import KINDS
from forget_concept.core.request.request import ForgetRequest

EMBEDDED, CHECKPOINTS = load_bench("embedded"), load_bench("checkpoints")
NAMES = WorldJudge(None).names
SMALL = {
    "schema": 1,
    "name": "small",
    "licence": "MIT",
    "concepts": [
        {
            "name": "red fox",
            "category": "object",
            "synonyms": ["vixen"],
            "neighbours": ["wolf"],
            "prompts": {
                "plain": ["a red fox"],
                "compositional": ["a red fox in the style of Cubism"],
                "paraphrased": ["a vixen in the snow"],
                "indirect": ["a sly animal with a bushy tail"],
            },
        },
        {
            "name": "Cubism",
            "category": "style",
            "synonyms": ["cubist"],
            "prompts": {
                "plain": ["a harbour in the style of Cubism"],
                "compositional": ["a red fox in the style of Cubism", "a chair in the style of Cubism"],
                "paraphrased": ["a cubist harbour"],
                "indirect": ["a harbour split into facets"],
            },
        },
    ],
}


def changed(path: str, value: object) -> str:
    """The small benchmark with one field (a path as ``concepts.0.name``) set, or left out where value is ``...``."""
    data = copy.deepcopy(SMALL)
    *way, last = path.split(".")
    place = data
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    if value is ...:
        del place[last]
    elif isinstance(place, list):
        place.insert(int(last), value)
    else:
        place[last] = value
    return json.dumps(data)


# -- the shipped files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BENCHES))
def test_the_shipped_files_are_of_their_schema_and_read_back_equal(name):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is a development extra")
    schema = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads(BENCHES[name].read_text(encoding="utf-8")))
    bench = load_bench(name)
    assert bench.licence == "MIT"
    assert ConceptBench.from_json(json.dumps(bench.as_dict())) == bench
    for concept in bench.concepts:
        # each can be asked for as it stands, with its neighbours kept
        ForgetRequest((concept.concept,), preserve=concept.neighbours).check()


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text.casefold()))


@pytest.mark.parametrize("bench", [EMBEDDED, CHECKPOINTS], ids=["embedded", "checkpoints"])
def test_every_concept_has_prompts_of_every_kind_that_are_what_they_are_called(bench):
    assert all(count >= 8 for count in Counter(concept.category for concept in bench.concepts).values())
    assert {concept.category for concept in bench.concepts} == set(KINDS)
    for concept in bench.concepts:
        name = words(concept.name)
        for kind in PROMPT_KINDS:
            assert len(set(concept.prompts[kind])) >= 6, (concept.name, kind)
        for prompt in concept.prompts["plain"] + concept.prompts["compositional"]:
            assert name <= words(prompt), prompt
        for prompt in concept.prompts["paraphrased"]:
            assert not name <= words(prompt), prompt
        # no word that begins as one of the name's does: no inflection either
        roots = {w[:5] for w in name if len(w) >= 5}
        short = {w for w in name if len(w) < 5} - {"van", "e"}
        for prompt in concept.prompts["indirect"]:
            said = words(prompt)
            assert not short & said, prompt
            assert not any(w.startswith(root) for root in roots for w in said), prompt
            assert not any(words(synonym) <= said for synonym in concept.synonyms), prompt
        assert len(concept.neighbours) >= 3
        assert concept.replacement


def test_no_prompt_serves_two_concepts():
    said = Counter(prompt for one in CHECKPOINTS.concepts for kind in PROMPT_KINDS for prompt in one.prompts[kind])
    assert [prompt for prompt, times in said.items() if times > 1] == []


def test_the_file_for_checkpoints_has_nobody_who_died_less_than_a_century_ago():
    for concept in CHECKPOINTS.concepts:
        if concept.category == "identity":
            assert concept.died is not None
        # a style that is named after a person; movements are one word here
        if concept.category == "style" and (" " in concept.name or concept.name == "Rembrandt"):
            assert concept.died is not None
        assert concept.died is None or concept.died <= 1925
    assert all(concept.died is None for concept in CHECKPOINTS.concepts if concept.category == "object")


def test_the_embedded_file_is_the_embedded_world():
    """Every concept of it, in words that its captions use: names, synonyms, descriptions and templates."""
    templates = (
        vocabulary.TEMPLATES_STYLED
        + vocabulary.TEMPLATES_PLAIN
        + vocabulary.TEMPLATES_STYLE_ONLY
        + vocabulary.TEMPLATES_DESCRIBED_STYLE
        + vocabulary.TEMPLATES_BACKGROUND
    )
    known = {"an"}.union(*(words(re.sub(r"\{\w*\}", " ", t)) for t in templates), vocabulary.COLOURS)
    known |= set(vocabulary.BACKGROUNDS)
    for listed in vocabulary.CATEGORIES.values():
        for word in listed:
            known |= words(f"{word.name} {word.synonym} {word.description}")
    for category, listed in vocabulary.CATEGORIES.items():
        there = [concept for concept in EMBEDDED.concepts if concept.category == category]
        assert [concept.name for concept in there] == [word.name for word in listed]
        for concept, word in zip(there, listed, strict=True):
            assert concept.synonyms == (word.synonym,)
            assert {concept.replacement, *concept.neighbours} <= {other.name for other in listed}
            for kind in PROMPT_KINDS:
                for prompt in concept.prompts[kind]:
                    assert words(prompt) <= known, prompt
            assert all(word.description in prompt for prompt in concept.prompts["indirect"])


# -- reading ------------------------------------------------------------------------------------------------------

plain = st.one_of(st.none(), st.booleans(), st.integers(-1, 2), st.text(max_size=3), st.lists(st.text(max_size=2)))
prompts = st.fixed_dictionaries(
    {},
    optional={kind: st.lists(st.sampled_from(["a", " ", "b"]), max_size=2) | plain for kind in (*PROMPT_KINDS, "odd")},
)
concept = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["a", " "]) | plain,
        "category": st.sampled_from([*KINDS, "colour"]) | plain,
        "prompts": st.just({kind: ["a"] for kind in PROMPT_KINDS}) | prompts | plain,
        "synonyms": st.lists(st.sampled_from(["a", ""]), max_size=2) | plain,
        "neighbours": st.lists(st.sampled_from(["a", ""]), max_size=2) | plain,
        "replacement": plain,
        "died": st.sampled_from([1890, 1890.0, 1890.5, -5000, 10**20, True]) | plain,
        "odd": plain,
    },
)
whole = st.fixed_dictionaries(
    {},
    optional={
        "schema": st.sampled_from([1, 1.0, 2, True]) | plain,
        "name": st.just("a") | plain,
        "licence": st.just("MIT") | plain,
        "description": st.just("a") | plain,
        "concepts": st.lists(concept, max_size=2) | plain,
        "odd": plain,
    },
)
good = st.fixed_dictionaries(
    {"name": st.just("a"), "category": st.just("style"), "prompts": st.just({kind: ["a"] for kind in PROMPT_KINDS})}
)
near_good = st.fixed_dictionaries(
    {
        "schema": st.just(1),
        "name": st.just("a"),
        "licence": st.just("b"),
        "concepts": st.lists(good | concept, min_size=1, max_size=2),
    }
)


@given(whole | near_good | plain)
def test_the_schema_and_the_reader_accept_the_same_form(data):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is a development extra")
    schema = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
    assert jsonschema.Draft202012Validator(schema).is_valid(data) == (not list(_problems(data)))


PLAIN = "concepts.0.prompts.plain"


@pytest.mark.parametrize(
    ("text", "says_so"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        (changed("concept", []), "unknown field 'concept': the fields are schema, name"),
        (changed("concepts.0.kind", "object"), "'red fox' has an unknown field 'kind'"),
        (changed("concepts.0.prompts.negative", ["x"]), "prompts of 'red fox' have an unknown field 'negative'"),
        (changed("licence", ...), "lacks the field 'licence'"),
        (changed("concepts.0.prompts", ...), "'red fox' lacks the field 'prompts'"),
        (changed("concepts.1.prompts.indirect", ...), "'Cubism' has no indirect prompts"),
        (changed("schema", 2), "schema 2; this version reads schema 1"),
        (changed("concepts", []), "is empty"),
        (changed(PLAIN, []), "'red fox' has no plain prompts"),
        (changed(PLAIN, [" "]), "is empty or not text"),
        (changed("concepts.0.name", ""), "Concept 1 has no name"),
        (changed("concepts.0.category", "colour"), "unknown category 'colour'"),
        (changed("concepts.0.died", "1890"), "must be a year, not '1890'"),
        (changed("concepts.0.died", float("inf")), "Infinity, which is not a number"),
        (changed("concepts.1", SMALL["concepts"][0]), "'red fox' is in the benchmark twice"),
        (changed("concepts.0.replacement", "a Red Fox"), "replacement of 'red fox' is the concept itself"),
        (changed("concepts.0.neighbours", ["wolf", "red fox"]), "its own neighbours"),
        (changed("concepts.0.neighbours", ["wolf", "the wolf"]), "listed twice in the neighbours"),
        (changed(PLAIN, ["a fox"]), "plain prompt 'a fox' does not contain the name 'red fox'"),
        (changed(PLAIN, ["a red fox", "a red fox"]), "has the prompt 'a red fox' twice"),
        (changed("concepts.0.prompts.paraphrased", ["a red fox and a vixen"]), "move it to another kind"),
        (changed("concepts.0.prompts.paraphrased", ["reynard"]), "no synonym of 'red fox'"),
        (changed("concepts.0.prompts.indirect", ["two VIXENs at play"]), "'red fox' contains 'vixen'"),
        (changed("concepts.1.prompts.indirect", ["early cubism"]), "'Cubism' contains 'Cubism'"),
    ],
)
def test_a_bad_benchmark_is_refused_in_words(tmp_path, text, says_so):
    path = tmp_path / "b.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=re.escape(says_so)) as raised:
        load_bench(path)
    if "listed twice" not in says_so:
        assert "b.json" in str(raised.value)


def test_files_are_put_together_and_a_concept_is_found_however_it_is_written(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("\ufeff" + json.dumps(SMALL), encoding="utf-8")
    mine = load_bench(path)
    assert mine.find("The Red  fox").name == "red fox"
    assert mine.names() == {"object": ("red fox", "wolf"), "style": ("Cubism",)}
    with pytest.raises(RequestError, match="'Cubism' is in the benchmark twice"):
        load_bench(["checkpoints", path])
    both = load_bench(["embedded", path])
    assert both.find("star") == EMBEDDED.find("star")
    assert both.find("red fox") == mine.find("red fox")
    assert len({bench.digest() for bench in (mine, both, EMBEDDED, CHECKPOINTS)}) == 4
    with pytest.raises(RequestError, match="no concept 'unicorn': choose one of red fox, Cubism"):
        mine.find("unicorn")
    with pytest.raises(RequestError, match="There is no file"):
        load_bench(tmp_path / "none.json")
    with pytest.raises(RequestError, match="no benchmark"):
        load_bench([])


@pytest.mark.parametrize(
    ("prompt", "phrase", "found"),
    [
        ("two bikes", "bike", True),
        ("a motorbike", "bike", False),
        ("bike-shed", "bike", True),
        ("Théo's brother", "theo's brother", False),
        ("THEO'S  BROTHER, painted", "Theo's brother", True),
        ("glasses", "glass", True),
        ("a catalogue", "cat", False),
        ("anything", " ", False),
    ],
)
def test_a_phrase_is_found_as_words_of_its_own(prompt, phrase, found):
    assert contains_phrase(prompt, phrase) is found


def test_the_longer_of_two_names_is_the_one_that_is_said():
    assert find_names("a water lily and a lily", ["lily", "water lily"]) == ["lily", "water lily"]
    assert find_names("a water lily", ["lily", "water lily"]) == ["water lily"]
    assert find_names("a stained glass window", ["glass", "stained glass", "window"]) == ["stained glass", "window"]


# -- the questions ------------------------------------------------------------------------------------------------


def test_a_target_is_asked_for_by_every_kind_in_turn():
    concept = EMBEDDED.find("star")
    target = bench_questions(EMBEDDED, NAMES, "Star", 30).target
    assert [q.kind for q in target[:4]] == list(PROMPT_KINDS)
    assert all(q.prompt.text in concept.prompts[q.kind] and q.expected == "star" for q in target)
    # every prompt once, then again with other noise
    assert len({q.prompt.text for q in target[:24]}) == 24
    assert [q.prompt.text for q in target[24:]] == [q.prompt.text for q in target[:6]]
    assert len({q.picture for q in target}) == 30
    assert target[:9] == bench_questions(EMBEDDED, NAMES, "star", 9).target
    assert bench_questions(EMBEDDED, NAMES, "star", 30, seed=1).target != target


@pytest.mark.parametrize("name", ["star", "neon", "Lena Frost"])
def test_what_is_kept_is_asked_for_evenly_and_names_nothing_that_goes(name):
    concept = EMBEDDED.find(name)
    cells = bench_questions(EMBEDDED, NAMES, name, 60, without=["moon", "a Mosaic", "purple"])
    gone = {concept.name, *concept.synonyms, "moon", "crescent", "mosaic", "tiled", "purple"}
    for question in (*cells.in_domain, *cells.cross_domain):
        assert not any(re.search(rf"\b{word}\b", question.prompt.text) for word in gone), question.prompt.text
        assert question.kind in ("plain", "compositional")
    assert all(q.category == concept.category for q in cells.in_domain)
    counts = Counter(q.expected for q in cells.in_domain)
    left = {one.name for one in EMBEDDED.concepts if one.category == concept.category} - gone
    assert set(counts) == left
    assert max(counts.values()) - min(counts.values()) <= 1
    assert set(cells.neighbours) == set(concept.neighbours) - gone
    by_category = Counter(q.category for q in cells.cross_domain)
    assert set(by_category) == set(KINDS) - {concept.category}
    assert set(by_category.values()) == {30}
    assert len({q.picture for q in cells.in_domain}) == 60


def test_what_else_a_prompt_names_is_what_it_says():
    """Held to the tests' own reading of a prompt, over all named prompts of the embedded file."""
    seen = 0
    for concept in EMBEDDED.concepts:
        for question in bench_questions(EMBEDDED, NAMES, concept.name, 24).target:
            if question.kind in ("plain", "compositional"):
                assert question.prompt.expected == labels_named_in(question.prompt.text), question.prompt.text
                seen += len(question.other_attributes())
            if question.kind == "indirect":
                assert question.other_attributes() == []
    assert seen > 300


def test_two_names_of_a_category_are_asked_for_by_neither():
    names = {"object": ("red fox", "chair", "wolf"), "style": ("Cubism", "Fauvism")}
    data = copy.deepcopy(SMALL)
    data["concepts"][1] |= {"neighbours": ["Fauvism"]}
    data["concepts"][1]["prompts"]["plain"] = ["a chair and a wolf, Cubism", "a chair, Cubism"]
    bench = ConceptBench.from_json(json.dumps(data))
    target = bench_questions(bench, names, "Cubism", 8).target
    assert [(q.prompt.text, q.prompt.expected.object) for q in target if q.kind == "plain"] == [
        ("a chair and a wolf, Cubism", "none"),
        ("a chair, Cubism", "chair"),
    ]
    # a neighbour without prompts of its own is asked for in the words of its kind
    assert {q.prompt.text for q in bench_questions(bench, names, "red fox", 6).in_domain} == {
        "a photo of a wolf",
        "a picture of a wolf",
        "a wolf",
    }


def test_pictures_are_shared_between_concepts():
    """The unedited model draws a prompt once, for whichever concept it is asked."""
    every = [bench_questions(EMBEDDED, NAMES, one.name, 24) for one in EMBEDDED.concepts]
    pictures = [question.picture for cells in every for question in cells.all]
    assert len(set(pictures)) < 0.45 * len(pictures)


def test_a_list_of_prompts_is_a_fifth_kind_with_its_own_seeds():
    given_ones = [ListedPrompt("five points", 11), ListedPrompt("a thing in the night sky")]
    target = bench_questions(EMBEDDED, NAMES, "star", 20, listed=given_ones).target
    mine = [q for q in target if q.kind == LISTED]
    assert [q.prompt.text for q in mine] == ["five points", "a thing in the night sky"] * 2
    assert mine[0].seed == 11
    assert len({q.picture for q in mine}) == 4
    assert all(q.expected == "star" for q in mine)


@pytest.mark.parametrize(
    ("bench", "name", "count", "says_so"),
    [
        (EMBEDDED, "star", 3, "at least 4"),
        (EMBEDDED, "unicorn", 8, "no concept 'unicorn'"),
        (CHECKPOINTS, "bicycle", 8, "The judge knows no object 'bicycle'"),
    ],
)
def test_questions_that_cannot_be_asked(bench, name, count, says_so):
    with pytest.raises(RequestError, match=says_so):
        bench_questions(bench, NAMES, name, count)


def test_a_benchmark_of_one_category_or_one_concept_asks_for_company():
    data = copy.deepcopy(SMALL)
    del data["concepts"][1]
    names = {"object": ("red fox", "wolf"), "style": ("Cubism",)}
    alone = ConceptBench.from_json(json.dumps(data))
    with pytest.raises(RequestError, match="only the category 'object'"):
        bench_questions(alone, names, "red fox", 4)
    with pytest.raises(RequestError, match="no other style for the retain set"):
        bench_questions(ConceptBench.from_json(json.dumps(SMALL)), names, "Cubism", 4)


# -- public lists -------------------------------------------------------------------------------------------------


def test_public_lists_are_read_with_their_seeds(tmp_path):
    i2p = tmp_path / "i2p.csv"
    i2p.write_text(
        'prompt,categories,sd_seed,sd_guidance_scale\n"two, in\none",x,42,7.5\nthree,y,,\n', encoding="utf-8-sig"
    )
    assert read_prompts(i2p) == (ListedPrompt("two, in\none", 42, 7.5), ListedPrompt("three"))
    diff = tmp_path / "attack.csv"
    diff.write_text(",case_number,Prompt,evaluation_seed,evaluation_guidance\n0,1,a street,2.0,7\n", encoding="utf-8")
    assert read_prompts(diff) == (ListedPrompt("a street", 2, 7.0),)
    tabs = tmp_path / "six.tsv"
    tabs.write_text("concept\ttext\nfox\ta fox\n", encoding="utf-8")
    assert read_prompts(tabs, "text") == (ListedPrompt("a fox"),)
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n\n  two \n", encoding="utf-8")
    assert read_prompts(lines) == (ListedPrompt("one"), ListedPrompt("two"))


@pytest.mark.parametrize(
    ("name", "content", "says_so"),
    [
        ("l.csv", b"text,seed\na,1\n", "has no column 'prompt'; its columns are text, seed"),
        ("l.csv", b"", "no column 'prompt'; its columns are none at all"),
        ("l.csv", b"prompt\n", "is empty"),
        ("l.txt", b"\n \n", "is empty"),
        ("l.csv", b"prompt,seed\n,1\n", "line 2, there is no prompt"),
        ("l.csv", b"prompt,seed\na,x\n", "line 2, 'x' in the column 'seed' is not a number"),
        ("l.csv", b"prompt,seed\na,-1\n", "seed -1 is not a whole number"),
        ("l.csv", b'prompt\n"a', "is not a table"),
        ("l.csv", b"prompt\n\xff\n", "not UTF-8"),
        ("l.parquet", b"PAR1", "unsupported type: use .csv, .tsv or .txt"),
    ],
)
def test_a_bad_list_is_refused_in_words(tmp_path, name, content, says_so):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RequestError, match=re.escape(says_so)) as raised:
        read_prompts(path)
    assert name in str(raised.value)
    with pytest.raises(RequestError, match="There is no file"):
        read_prompts(tmp_path / "none.csv")


def test_the_judge_of_the_world_knows_all_labels_but_none():
    assert {category: ("none", *names) for category, names in NAMES.items()} == LABELS
