"""Requests: sense, form, the JSON there and back, and the shipped schema held equal to the check in Python."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forget_concept.core.errors import RequestError
from forget_concept.core.request.concept import KINDS, Concept, default_replacement, normalized_phrase, templates
from forget_concept.core.request.request import SCHEMA_PATH, ForgetRequest, _problems, strength_warning


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ForgetRequest(()), "at least one"),
        (ForgetRequest((Concept(""),)), "empty"),
        (ForgetRequest((Concept(" \t"),)), "empty"),
        (ForgetRequest((Concept("star", "thing"),)), "object, style, identity"),
        (ForgetRequest((Concept("star", replacement="Star"),)), "itself"),
        (ForgetRequest((Concept("blue star", replacement=" blue  STAR "),)), "itself"),
        (ForgetRequest((Concept("star", replacement="a star"),)), "itself"),
        (ForgetRequest((Concept("star"), Concept("STAR"))), "twice"),
        (ForgetRequest((Concept("star", replacement="circle"), Concept("circle"))), "itself to be forgotten"),
        (ForgetRequest((Concept("caf\u00e9"), Concept("cafe\u0301"))), "twice"),
        (ForgetRequest((Concept("caf\u00e9", replacement="CAFE\u0301"),)), "itself"),
        (ForgetRequest((Concept("caf\u00e9"),), preserve=("a photo of a cafe\u0301",)), "contains"),
        (ForgetRequest((Concept("saber_(fate)"), Concept(r"saber_\(fate\)"))), "twice"),
        (ForgetRequest((Concept("caf\udce9"),)), "not valid Unicode"),
        (ForgetRequest((Concept("star", replacement="\ud800"),)), "not valid Unicode"),
        (ForgetRequest((Concept("star"),), settings={"x": ["\udfff"]}), "not valid Unicode"),
        (ForgetRequest((Concept("star"),), preserve=("moon", "STAR")), "contains 'STAR'"),
        (ForgetRequest((Concept("star"),), preserve=("A photo of a star",)), "contains"),
        (ForgetRequest((Concept("star"),), preserve=("",)), "must be words"),
        (ForgetRequest((Concept("star"),), strength=float("nan")), "strength"),
        (ForgetRequest((Concept("star"),), strength=float("inf")), "strength"),
        (ForgetRequest((Concept("star"),), strength=0), "strength"),
        (ForgetRequest((Concept("star"),), strength=-1), "strength"),
        (ForgetRequest((Concept("star"),), seed=-1), "seed"),
        (ForgetRequest((Concept("star"),), seed=1.5), "seed"),
        (ForgetRequest((Concept("star"),), method=""), "method"),
        (ForgetRequest((Concept("star"),), settings={"x": float("nan")}), "setting 'x'"),
        (ForgetRequest((Concept("star"),), settings={"x": object()}), "setting 'x'"),
        (ForgetRequest((Concept("star", replacement=3),)), "must be words"),
    ],
)
def test_what_cannot_be_meant_is_refused(request_, words):
    with pytest.raises(RequestError, match=words):
        request_.check()


@pytest.mark.parametrize("field", ["concepts", "preserve"])
def test_a_single_word_is_no_list(field):
    with pytest.raises(RequestError, match="list"):
        ForgetRequest(**({"concepts": (Concept("a"),)} | {field: "star"}))


def test_good_requests_pass():
    ForgetRequest((Concept("star"),)).check()
    ForgetRequest((Concept("star", replacement=""),)).check()
    ForgetRequest(
        (Concept("star", replacement="starfish"),), preserve=("starfish", "star wars"), seed=2**64 - 1
    ).check()


names = st.text(min_size=1, max_size=12).filter(lambda s: s.strip() and s == s.encode("utf-8", "ignore").decode())


@given(
    st.lists(
        st.builds(Concept, names, st.sampled_from(KINDS), st.none() | names, st.lists(names)), min_size=1, max_size=4
    ),
    st.lists(names, max_size=4),
    st.dictionaries(
        names,
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.lists(names),
    ),
    st.floats(0, 10, exclude_min=True),
    st.integers(0, 2**64 - 1),
)
def test_json_goes_there_and_back(concepts, preserve, values, strength, seed):
    values = {k: v for k, v in values.items() if not (isinstance(v, int) and abs(v) > 1e300)}
    request = ForgetRequest(tuple(concepts), tuple(preserve), "m", "p", values, strength, seed)
    assert ForgetRequest.from_json(request.to_json()) == request
    assert ForgetRequest.from_json(request.to_json(indent=2)) == request


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from(["", " ", "star", "object", "1", "x" * 2000, "x" * 2001, "x" * 4096, "x" * 4097]),
    st.just(1e308),
)
concept = st.one_of(
    plain,
    st.fixed_dictionaries(
        {"name": st.sampled_from(["star", "a b"]) | plain},
        optional={
            "kind": st.sampled_from([*KINDS, "x", 3]),
            "replacement": plain,
            "odd": plain,
            "images": plain | st.lists(plain),
        },
    ),
)
document = st.one_of(
    plain,
    st.fixed_dictionaries(
        {"schema": st.just(1) | st.just(1.0), "concepts": st.lists(concept, max_size=2) | plain},
        optional={
            "preserve": st.lists(plain, max_size=2) | plain,
            "method": plain,
            "preset": plain,
            "settings": st.dictionaries(st.sampled_from("ab"), plain | st.lists(plain | st.lists(plain), max_size=2))
            | plain,
            "strength": st.floats(-1, 12) | plain | st.integers(-1, 12),
            "seed": st.integers(-2, 2**64 + 2) | plain,
            "theme": st.just("sea") | plain,
            "theme_replacement": plain,
            "other": plain,
        },
    ),
    st.dictionaries(st.sampled_from(["schema", "concepts", "preserve"]), plain, max_size=3),
    st.fixed_dictionaries(
        {"schema": st.just(1), "theme": st.just("sea") | plain},
        optional={"concepts": st.lists(concept, max_size=1) | plain, "theme_replacement": plain},
    ),
    st.just({"schema": 1, "concepts": [{"kind": "object"}]}),
)


@pytest.mark.parametrize(
    ("field", "most"), [("concepts", 10_000), ("preserve", 10_000), ("images", 1000), ("x", 10_000)]
)
def test_lists_are_bounded_as_in_the_schema(field, most):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is a development extra")
    schema = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
    for count in (most, most + 1):
        words = [f"w{number}" for number in range(count)]
        data = {"schema": 1, "concepts": [{"name": "star"}]}
        if field == "concepts":
            data["concepts"] = [{"name": word} for word in words]
        elif field == "images":
            data["concepts"][0]["images"] = words
        elif field == "preserve":
            data["preserve"] = words
        else:
            data["settings"] = {"x": words}
        problems = list(_problems(data))
        assert jsonschema.Draft202012Validator(schema).is_valid(data) == (not problems) == (count == most)
        assert all(f"{most:,}" in problem and len(problem) < 400 for problem in problems)


def test_numbers_that_no_float_holds_are_refused_in_words():
    for change in ({"strength": 10**400}, {"seed": 10**400}, {"settings": {"rank": 10**400}}):
        with pytest.raises(RequestError):
            ForgetRequest((Concept("star"),), **change).to_json()


@settings(max_examples=500, deadline=None)
@given(document)
def test_the_schema_and_the_check_in_python_accept_the_same(data):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is a development extra")
    try:  # NaN and infinity are no JSON, so a schema is never asked about them
        text = json.dumps(data, allow_nan=False)
    except ValueError:
        return
    schema = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
    valid = jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
    assert valid == (not list(_problems(json.loads(text))))
    if valid:
        ForgetRequest.from_json(text)
    else:
        with pytest.raises(RequestError):
            ForgetRequest.from_json(text)


def test_the_schema_is_one():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is a development extra")
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA_PATH.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ('{"schema": 2, "concepts": [{"name": "a"}]}', "schema 2"),
        ('{"schema": 1}', "lacks the field 'concepts'"),
        ('{"schema": 1, "concepts": [{"name": "a"}], "strenght": 1}', "unknown field 'strenght'"),
        ('{"schema": 1, "concepts": [{"name": "a"}], "strength": NaN}', "NaN"),
        ('{"schema": 1, "concepts": [{"name": "a"}], "strength": 1e999}', "1e999"),
        ('{"schema": 1, "concepts": ["a"]}', "object with a 'name'"),
        ("[" * 100000, "deeply|valid"),
    ],
)
def test_bad_json_is_refused_in_words(text, words):
    with pytest.raises(RequestError, match=words):
        ForgetRequest.from_json(text)


def test_files(tmp_path):
    path = tmp_path / "request.json"
    with pytest.raises(RequestError, match=r"There is no file .*request\.json'"):
        ForgetRequest.from_file(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="UTF-8"):
        ForgetRequest.from_file(path)
    path.write_text('{"schema": 1}', encoding="utf-8")
    with pytest.raises(RequestError, match=r"request\.json'.*lacks"):
        ForgetRequest.from_file(path)
    path.write_text('\ufeff{"schema": 1, "concepts": [{"name": "Stern"}]}', encoding="utf-8")
    assert ForgetRequest.from_file(path).concepts == (Concept("Stern"),)


def test_kinds():
    for kind in KINDS:
        assert default_replacement(kind) == "" and len(templates(kind)) == len(set(templates(kind))) >= 3
        assert all(t.count("{}") == 1 for t in templates(kind))
    assert templates("style")[0] == "a photo in the style of {}"
    with pytest.raises(RequestError, match="thing"):
        templates("thing")
    assert normalized_phrase("  A  Star ") == "a star"


def test_pictures_are_found_from_the_requests_file_and_stay_this_machines_business(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"schema": 1, "concepts": [{"name": "star", "images": ["mine", "/there/a.png"]}]}')
    request = ForgetRequest.from_file(path)
    assert request.concepts[0].images == (str(tmp_path / "mine"), "/there/a.png")
    assert ForgetRequest.from_json(request.to_json()) == request
    assert "mine" not in request.without_images().to_json() and str(tmp_path) not in request.without_images().to_json()
    with pytest.raises(RequestError, match="must be a list"):
        Concept("star", images="mine")


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip))
def test_every_unicode_form_of_a_name_is_one_concept(name):
    """Canonically equivalent texts look the same, so nobody can mean two things by them."""
    forms = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
    assert len({normalized_phrase(form) for form in (name, *forms)}) == 1


@given(
    st.sampled_from(["\ud800", "\udce9", "\udfff"]), st.sampled_from(["name", "preserve", "setting", "key", "method"])
)
def test_half_characters_are_refused_wherever_they_stand_in_json(half, place):
    document = {
        "schema": 1,
        "concepts": [{"name": "star"}],
        "preserve": ["moon"],
        "method": "uce",
        "settings": {"a": 1},
    }
    if place == "name":
        document["concepts"][0]["name"] += half
    elif place == "preserve":
        document["preserve"].append(half)
    elif place == "setting":
        document["settings"]["a"] = ["b", half]
    elif place == "key":
        document["settings"][half] = 1
    else:
        document["method"] = half
    with pytest.raises(RequestError, match="not valid Unicode") as refused:
        ForgetRequest.from_json(json.dumps(document))
    str(refused.value).encode()  # the message itself can be printed


@pytest.mark.parametrize("strength", [0.05, 0, -1, 1, 1.5, -1.5])
def test_no_warning_at_a_usual_strength(strength):
    assert strength_warning(strength) is None


@pytest.mark.parametrize("strength", [1.51, 2, -3, 10])
def test_a_high_strength_is_warned_of(strength):
    warning = strength_warning(strength)
    assert warning is not None and f"strength {strength:g}" in warning and "at most 1.5" in warning
