"""Themes are lists of concepts in text files; a request with one is planned with the concepts in its place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tiny import fit, tiny_model

from forget_concept.core.errors import RequestError
from forget_concept.core.methods.base import Method
from forget_concept.core.methods.registry import all_methods, get, plan_request
from forget_concept.core.mini import vocabulary
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.plan import Plan
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.request.settings import quick_settings
from forget_concept.core.request.themes import PACKAGE_THEMES, expanded, load_theme, themes, user_theme_folder

NAMES = sorted(path.stem for path in PACKAGE_THEMES.glob("*.txt"))
WANTED = {"nudity", "violence", "weapons", "drugs", "hate-symbols", "self-harm", "watermarks", "text-overlays", "sea"}


def named(name: str, **more) -> ForgetRequest:
    return ForgetRequest((), theme=name, **more)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("method", sorted(all_methods()))
@pytest.mark.parametrize("name", NAMES)
def test_every_theme_is_a_request_of_every_method(name: str, method: str) -> None:
    theme = load_theme(name, ())
    plan = plan_request(named(name, theme_replacement="tree", method=method), ())
    assert plan.request.theme is None and plan.request.theme_replacement is None
    assert [concept.name for concept in plan.request.concepts] == [concept.name for concept in theme.concepts]
    assert {concept.replacement for concept in plan.request.concepts} == {"tree"}
    assert len(theme.concepts) > 3 and theme.about


def test_the_themes_are_these() -> None:
    assert set(NAMES) == WANTED and list(themes(())) == NAMES


def test_the_embedded_worlds_theme_is_whole() -> None:
    found = {concept.name for concept in load_theme("sea", ()).concepts}
    assert set(vocabulary.THEME_OBJECTS) | {vocabulary.THEME} <= found


def test_an_unknown_theme_names_those_there_are() -> None:
    with pytest.raises(RequestError, match=r"'fun' is not known.*drugs.*weapons"):
        load_theme("fun", ())


def test_a_request_of_its_own_concepts_is_left_as_it_is() -> None:
    request = ForgetRequest((Concept("star"),))
    assert expanded(request, ()) is request


def test_own_concepts_come_first_and_once_and_keep_what_they_state() -> None:
    request = ForgetRequest(
        (Concept("star"), Concept("A boat", replacement="house")), theme="sea", theme_replacement="tree"
    )
    found = plan_request(request, ()).request.concepts
    assert found[:2] == (Concept("star"), Concept("A boat", replacement="house"))
    assert [one.name for one in found].count("boat") == 0
    assert {one.replacement for one in found[2:]} == {"tree"}


def test_a_users_list_takes_the_place_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine, other):
        folder.mkdir()
    (mine / "Sea.txt").write_text(
        "\ufeff# My sea\n# not this one\nwhale, squid\nfoam (style) -> sand\n\n", encoding="utf-8"
    )
    (other / "sea.txt").write_text("rock", encoding="utf-8")
    (other / "Birds_of prey.txt").write_text("hawk", encoding="utf-8")
    found = load_theme("SEA", [mine, other])
    assert found.concepts == (Concept("whale"), Concept("squid"), Concept("foam", "style", "sand"))
    assert found.about == "My sea" and found.path == mine / "Sea.txt"
    assert load_theme("birds of prey", [mine, other]).concepts == (Concept("hawk"),)
    assert set(themes([mine, other])) == WANTED | {"birds-of-prey"}
    request = plan_request(named("sea", theme_replacement="stone"), [mine]).request
    assert [concept.replacement for concept in request.concepts] == ["stone", "stone", "sand"]
    # the folder of the command line and the library
    monkeypatch.setenv("FORGET_CONCEPT_THEMES", str(other))
    assert user_theme_folder() == other
    assert [concept.name for concept in plan_request(named("sea")).request.concepts] == ["rock"]
    monkeypatch.delenv("FORGET_CONCEPT_THEMES")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert user_theme_folder() == tmp_path / ".forget-concept" / "themes"
    assert len(plan_request(named("sea")).request.concepts) == len(load_theme("sea", ()).concepts)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no entries"),
        (b"# only a comment\n\n", "no entries"),
        (b"\xff\xfe", "not UTF-8"),
        (b"-> circle", "nothing before its arrow"),
    ],
)
def test_a_list_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(RequestError, match=says) as caught:
        load_theme("mine", [tmp_path])
    assert "mine.txt" in str(caught.value)


def test_prompt_syntax_and_a_word_given_twice_are_refused_in_a_list_too(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("(star:1.3)", encoding="utf-8")
    with pytest.raises(RequestError, match="write 'star'"):
        plan_request(named("mine"), [tmp_path])
    with pytest.raises(RequestError, match="preserve list contains 'fish'"):
        plan_request(named("sea", preserve=("fish",)), ())


def test_a_theme_that_was_not_looked_up_has_no_plan() -> None:
    with pytest.raises(RequestError, match="plan_request"):
        Plan(named("sea"), get("uce"))


def test_json_goes_there_and_back() -> None:
    request = named("sea", theme_replacement="tree", preserve=("moon",))
    assert ForgetRequest.from_json(request.to_json()) == request
    assert ForgetRequest.from_json('{"schema": 1, "theme": "sea"}') == named("sea")
    assert "theme" not in ForgetRequest((Concept("star"),)).to_json()


@pytest.mark.parametrize("method", ["uce", "forget_me_not"])
def test_the_patch_is_that_of_the_concepts_and_records_them(model, method: str) -> None:
    cls: type[Method] = get(method)
    request = named("sea", theme_replacement="star", preserve=("tree",), method=method, settings=quick_settings(cls))
    concepts = tuple(dataclasses.replace(one, replacement="star") for one in load_theme("sea", ()).concepts)
    patch = fit(model, request)
    same = fit(model, dataclasses.replace(request, concepts=concepts, theme=None, theme_replacement=None))
    assert patch.metadata == same.metadata and patch.about.concepts == tuple(one.name for one in concepts)
    assert all((patch.factors[key].delta() == same.factors[key].delta()).all() for key in same.factors)


def test_a_method_that_shows_nothing_else_needs_no_replacement_of_the_theme() -> None:
    with pytest.raises(RequestError, match="replacement"):
        fit(tiny_model(), named("sea", preserve=("tree",), method="forget_me_not", preset="theme"))
