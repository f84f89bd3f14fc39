"""The webui's form and what the tab shows: a request goes in and out unchanged, and nothing typed becomes markup."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from fakewebui import FakeWebui

from forget_concept.core.errors import RequestError
from forget_concept.core.methods.registry import all_methods
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.service import html
from forget_concept.core.service.forms import form_fields, form_values, presets
from forget_concept.core.service.host_interface import ActivePatch
from forget_concept.core.service.jobs import Job, Outcome, Pair
from forget_concept.core.service.options import Settings, options
from forget_concept.core.service.page_form import ROWS, Form, Line, recall, remember
from forget_concept.core.service.patch_library import Entry

METHODS = [pytest.param(method, id=name) for name, method in all_methods().items()]
EVIL = "<img src=x onerror=alert(1)>\"'&"


def blank(**more: object) -> Form:
    fields = presets(all_methods()["uce"])["tuned"]
    form = Form((Line("star", "circle"),), "moon, heart", "uce", "tuned", fields, 1.0, "0")
    return dataclasses.replace(form, **more)


@pytest.mark.parametrize("method", METHODS)
def test_a_request_of_every_method_and_preset_comes_back_from_the_form(method) -> None:
    for preset in method.presets:
        request = ForgetRequest(
            (Concept("star", "object", "circle"), Concept("van Gogh", "style")),
            ("moon", "heart"),
            method.id,
            preset,
            strength=0.5,
            seed=2**64 - 1,
        )
        assert Form.of(request).request() == request


def test_only_what_differs_from_the_preset_is_in_the_request() -> None:
    request = ForgetRequest(
        (Concept("star"),),
        method="forget_me_not",
        settings={"rank": 6, "train": ["to_k"], "templates": ["a {} there", "{} here"], "guidance": 3.5},
    )
    form = Form.of(request)
    assert form.request() == request
    assert Form.of(dataclasses.replace(request, settings={"rank": 8})).request().settings == {}
    assert ForgetRequest.from_json(form.request().to_json()) == request


@pytest.mark.parametrize("method", METHODS)
def test_the_fields_are_filled_for_every_setting(method) -> None:
    for preset in method.presets:
        assert form_values(method, method.presets[preset]) == presets(method)[preset]
        assert list(form_values(method, method.presets[preset])) == [field.name for field in form_fields(method)]


def test_lines_without_words_are_left_out_and_pictures_go_where_they_are_looked_at() -> None:
    lines = (Line(), Line("  star "), Line("moon", " ", "object", ("a.png",)))
    assert blank(lines=lines, preserve="").request().concepts == (Concept("star"), Concept("moon"))
    fields = presets(all_methods()["forget_me_not"])["tuned"]
    trained = blank(lines=lines, preserve="", method="forget_me_not", fields=fields).request()
    assert trained.concepts[1].images == ("a.png",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lines": (Line(),)}, "Nothing to forget"),
        ({"lines": (Line("", "circle"),)}, "a replacement or pictures and no concept"),
        ({"lines": (Line("star"), Line("a star"))}, "given twice"),
        ({"preserve": "star"}, "preserve list"),
        ({"seed": "many"}, "whole number, not 'many'"),
        ({"seed": "-1"}, "seed"),
        ({"strength": None}, "strength is empty"),
        ({"strength": 0.0}, "strength"),
        ({"method": "magic"}, "'magic' is not known"),
        ({"preset": "best"}, "no preset 'best'"),
    ],
)
def test_a_form_that_means_nothing_says_why(change: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        blank(**change).plan()


def test_a_number_that_was_emptied_is_named() -> None:
    fields = presets(all_methods()["uce"])["tuned"] | {"ridge": None}
    with pytest.raises(RequestError, match="'ridge' must be a number"):
        blank(fields=fields).plan()


def test_more_concepts_than_lines_are_told() -> None:
    request = ForgetRequest(tuple(Concept(f"thing {i}") for i in range(ROWS + 1)))
    with pytest.raises(RequestError, match=f"{ROWS + 1} concepts, and this page has {ROWS} lines"):
        Form.of(request)


def test_words_with_a_comma_are_not_taken_apart_in_silence() -> None:
    request = ForgetRequest((Concept("star"),), preserve=("moon", "heart, broken"))
    with pytest.raises(RequestError, match="contain a comma"):
        Form.of(request)
    kept = dataclasses.replace(request, preserve=("moon", "van Gogh"))
    assert Form.of(kept).request().preserve == ("moon", "van Gogh")


def test_a_theme_stays_a_name_in_the_form_and_becomes_its_concepts_in_the_plan(tmp_path: Path) -> None:
    folder = tmp_path / "themes"
    folder.mkdir()
    (folder / "toys.txt").write_text("# Mine.\nball\nkite -> bird\n", encoding="utf-8")
    form = blank(lines=(Line(),), theme="toys", theme_replacement="circle")
    request = form.request()
    assert (request.concepts, request.theme, request.theme_replacement) == ((), "toys", "circle")
    assert ForgetRequest.from_json(request.to_json()) == request and Form.of(request, [folder]).request() == request
    planned = form.plan([folder]).request.concepts
    assert [(one.name, one.replacement) for one in planned] == [("ball", "circle"), ("kite", "bird")]
    remember(tmp_path / "data", request, {})
    found = recall(tmp_path / "data", [folder])
    assert found is not None and (found[0].theme, found[0].theme_replacement, found[0].lines) == ("toys", "circle", ())
    assert recall(tmp_path / "data", [tmp_path / "elsewhere"]) is None
    with pytest.raises(RequestError, match="'toys' is not known: choose one of"):
        form.plan([tmp_path / "elsewhere"])
    with pytest.raises(RequestError, match="without a theme: choose one, or empty the box"):
        blank(theme_replacement="circle").plan()


def test_what_was_asked_for_last_is_remembered_without_pictures(tmp_path: Path) -> None:
    assert recall(tmp_path / "data") is None
    request = ForgetRequest((Concept("star", images=("/home/me/star.png",)),), method="forget_me_not")
    remember(tmp_path / "data", request, {"name": "mine", "pairs": 2})
    found = recall(tmp_path / "data")
    assert found is not None and found[0] == Form.of(request) and found[1] == {"name": "mine", "pairs": 2}
    (file,) = (tmp_path / "data").iterdir()
    assert "/home/me" not in file.read_text()
    for broken in ("{", "[]", json.dumps({"request": {"schema": 1, "concepts": []}}), json.dumps({})):
        file.write_text(broken)
        assert recall(tmp_path / "data") is None
    gone = json.loads(request.without_images().to_json()) | {"method": "of another version"}
    file.write_text(json.dumps({"request": gone}))
    assert recall(tmp_path / "data") is None


# -- settings -------------------------------------------------------------------------------------------------------


def test_every_setting_has_words_and_a_default_that_it_may_have(tmp_path: Path) -> None:
    for option in options():
        assert option.label and option.key.startswith("forget_concept_")
        assert option.kind != "choice" or option.default in option.choices
        assert option.kind != "whole" or option.low <= option.default <= option.high
    host = FakeWebui(None, tmp_path)  # type: ignore[arg-type]
    assert Settings.of(host) == Settings("uce", "tuned", "forget", "float32", 4, 20, False, True, ())
    host.chosen["forget_concept_folder"] = " \\mine\\ "
    assert Settings.of(host).folder == "mine"
    for folder in ("../out", "a/../../b", "C:\\x"):
        host.chosen["forget_concept_folder"] = folder
        # the tab is there all the same: only what would be saved is refused
        settings = Settings.of(host)
        with pytest.raises(RequestError, match="must lie within the Lora folder"):
            _ = settings.folder


# -- what is shown --------------------------------------------------------------------------------------------------


class Marks(HTMLParser):
    """Every element of a text with its attributes, and whether each that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def entry(name: str, concept: str, tmp_path: Path) -> Entry:
    metadata = {"forget_concept.method": EVIL, "forget_concept.concepts": json.dumps([concept])}
    return Entry(name, tmp_path / "x.safetensors", "x.safetensors", 1, 0.0, metadata)


def test_nothing_that_was_typed_becomes_markup(tmp_path: Path) -> None:
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    job = Job("1", "forget", EVIL, "failed", message=EVIL, error=EVIL)
    done = Job("1", "forget", EVIL, "done", outcome=Outcome(EVIL, {}, (Pair(EVIL, 1, image, image),)))
    running = Job("1", "forget", EVIL, "running", 1, 2, 0.5, EVIL)
    texts = [
        html.problem(EVIL),
        html.notice(EVIL),
        html.question(EVIL),
        html.state(job, 1),
        html.state(running, 2),
        html.state(None, 0),
        html.outcome(done),
        html.cards([entry(EVIL, EVIL, tmp_path)], EVIL, [EVIL]),
        html.active_table([ActivePatch(EVIL, 1.0, False)], EVIL),
        html.active_table([], EVIL),
        html.details({"words": EVIL}),
        html.report_frame(f"<!DOCTYPE html><p>{EVIL}</p>", EVIL),
    ]
    for text in texts:
        marks = Marks(text)
        sources = [one["src"] for one in marks.all("img")]
        assert all(source is not None and source.startswith("data:image/jpeg;base64,") for source in sources)
        assert not any(name.startswith("on") for _, attributes in marks.found for name in attributes)
        assert marks.all("script") == []
    (frame,) = Marks(texts[-1]).all("iframe")
    assert frame["sandbox"] == "" and frame["title"] == EVIL


def test_a_job_is_shown_with_its_step_and_its_time() -> None:
    running = Job("1", "forget", "forgetting 'star'", "running", 25, 100, 0.125, "training", 61.0, 183.4)
    marks = Marks(html.state(running, 7))
    assert "training, step 25 of 100, loss 0.125, 3:03 left, 1:01 so far" in marks.words
    (bar,) = (one for one in marks.all("div") if one.get("role") == "progressbar")
    assert (bar["aria-valuenow"], bar["aria-label"]) == ("25", "training")
    (state,) = (one for one in marks.all("div") if "data-state" in one)
    assert (state["data-state"], state["data-beat"]) == ("running", "7")
    stopped = html.state(dataclasses.replace(running, stopping=True), 8)
    assert "stopping after this step" in stopped
    over = Marks(html.state(dataclasses.replace(running, state="failed", error="No."), 9))
    assert any(one.get("role") == "alert" for one in over.all("div"))
    assert not any(one.get("role") == "progressbar" for one in over.all("div"))


def test_pictures_before_and_after_say_what_they_are() -> None:
    before, after = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 255, dtype=torch.uint8)
    pair = Pair("a photo of star", 3, before, after)
    marks = Marks(html.outcome(Job("1", "forget", "x", "done", outcome=Outcome("done so", {}, (pair,)))))
    said = [one["alt"] for one in marks.all("img")]
    assert said == ["before: a photo of star, seed 3", "after: a photo of star, seed 3"]
    assert len({one["src"] for one in marks.all("img")}) == 2
    assert "done so" in marks.words


def test_cards_are_buttons_and_say_which_is_chosen_and_which_is_on(tmp_path: Path) -> None:
    entries = [entry(f"p{i}", "star", tmp_path) for i in range(65)]
    marks = Marks(html.cards(entries, "p1", ["p2"]))
    buttons = marks.all("button")
    assert len(buttons) == html.MOST_CARDS and "5 older ones" in marks.words
    assert [one["data-name"] for one in buttons if one["aria-pressed"] == "true"] == ["p1"]
    assert marks.words.count("in the model") == 1
    assert "no patches yet" in html.cards([], None, [])


def test_the_scripts_and_styles_speak_of_what_the_tab_has() -> None:
    """Ids and classes are written in three places; they stay the same."""
    root = Path(html.__file__).resolve().parents[2]
    script = (root / "javascript" / "forget_concept.js").read_text(encoding="utf-8")
    files = [*(root / "sd_webui_ext").glob("*.py"), root / "core" / "service" / "html.py"]
    python = "".join(file.read_text(encoding="utf-8") for file in files)
    # what the script itself makes
    own = {"forget_concept_speaker", "forget_concept_badge_"}
    for name in set(re.findall(r"#?(forget_concept_[a-z_]+)", script)) - own:
        short = name.removeprefix("forget_concept_")
        assert f"{{_ID}}{short}" in python or f'"{name}"' in python, name
    style = (root / "style.css").read_text(encoding="utf-8")
    for name in set(re.findall(r"\.(fc-[a-z]+)", style + script)) - {"fc-yes"}:
        assert name in python or name in ("fc-no",), name
