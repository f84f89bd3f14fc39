"""The tab as a person sees it: a real Chromium on a real webui (gradio 3) and on Forge (gradio 4)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium
from webuihost import REQUIRED, ROOT, WebUI, hosts, missing

from forget_concept.core.request.request import ForgetRequest

LIMIT = 300_000
REQUEST = {
    "schema": 1,
    "concepts": [
        {"name": "star", "kind": "object", "replacement": "circle"},
        {"name": "van Gogh", "kind": "style"},
    ],
    "preserve": ["moon", "heart"],
    "method": "forget_me_not",
    "preset": "published",
    "settings": {"rank": 6, "train": ["to_k"], "templates": ["a {} there", "{} here"], "guidance": 3.5},
    "strength": 0.75,
    "seed": 18446744073709551615,
}


class Tab:
    """The page of a running webui with the tab open."""

    def __init__(self, host: WebUI, page: Any) -> None:
        self.host, self.page = host, page
        page.set_default_timeout(LIMIT)
        self.complaints: list[str] = []
        self.waiting: set[Any] = set()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.waiting.add(request) if "/predict" in request.url else None)
        for over in ("requestfinished", "requestfailed"):
            page.on(over, lambda request: self.waiting.discard(request))

    def open(self) -> None:
        self.waiting.clear()  # of the page before, whose requests may never be heard of again
        self.page.goto(f"http://127.0.0.1:{self.host.port}/")
        self.page.get_by_role("button", name="Forget Concept", exact=True).or_(
            self.page.get_by_role("tab", name="Forget Concept", exact=True)
        ).first.click(timeout=LIMIT)
        # the page has been told how things stand
        self.page.wait_for_selector('#forget_concept_state .fc-state:not([data-beat="0"])', timeout=LIMIT)

    def part(self, name: str) -> None:
        self.page.locator("#forget_concept_tabs > .tab-nav button").get_by_text(name, exact=True).click()
        self.settle()

    def settle(self) -> None:
        """Until the page has sent what was done to it, has had its answers and has shown them."""
        self.page.wait_for_timeout(200)
        end = time.monotonic() + 30
        while self.waiting and time.monotonic() < end:
            self.page.wait_for_timeout(50)
        self.waiting.clear()  # what has had no answer by now is not waited for again
        self.page.wait_for_timeout(200)

    def at(self, name: str) -> Any:
        # gradio 3 gives a block and what is in it the same id
        return self.page.locator(f"#forget_concept_{name}").first

    def box(self, name: str) -> Any:
        return self.page.locator(f"#forget_concept_{name} textarea, #forget_concept_{name} input").first

    def fill(self, name: str, text: str) -> None:
        self.box(name).fill(text)

    def value(self, name: str) -> str:
        return self.box(name).input_value()

    def press(self, name: str) -> None:
        self.at(name).click()
        self.settle()

    def choose(self, name: str, option: str) -> None:
        self.page.locator(f"#forget_concept_{name} input").first.click()
        self.page.locator("ul li", has_text=option).last.click()
        self.settle()

    def walk(self, typed: dict[str, str], to: str) -> None:
        """From the first field to the button ``to`` by the keyboard alone, writing on the way."""
        left, here = dict(typed), ""
        self.box("concept_1").focus()
        for _ in range(60):
            where = "() => document.activeElement.closest('[id^=forget_concept_]')?.id ?? ''"
            here = self.page.evaluate(where).removeprefix("forget_concept_")
            if here == to:
                break
            if here in left:
                self.page.keyboard.press("Control+A")
                self.page.keyboard.type(left.pop(here))
            self.page.keyboard.press("Tab")
        assert here == to and not left
        self.settle()
        self.page.keyboard.press("Enter")
        self.settle()

    def go(self, page: str) -> None:
        """To another of the webui's own pages; Forge writes their names with a capital letter."""
        whole = re.compile(rf"^\s*{page}\s*$", re.IGNORECASE)
        self.page.locator("#tabs > .tab-nav button", has_text=whole).click()
        self.settle()

    def badge(self, page: str, words: str) -> Any:
        """Wait for words on the badge of txt2img or img2img; the badge."""
        found = self.page.locator(f"#forget_concept_badge_{page}")
        found.get_by_text(words).first.wait_for(timeout=LIMIT)
        return found

    def checkpoint(self, name: str) -> None:
        """Choose a checkpoint in the webui's own menu."""
        self.page.locator("#setting_sd_model_checkpoint input, .model_selection input").first.click()
        self.page.locator("ul li", has_text=name).last.click()
        self.settle()
        if self.host.kind == "forge":  # it loads the checkpoint with the next picture
            self.host.draw("a star")
            self.go("img2img")
            self.go("txt2img")

    def seen(self, name: str) -> bool:
        return self.at(name).is_visible()

    def text(self, name: str) -> str:
        return self.at(name).inner_text()

    def state(self, name: str, *states: str) -> str:
        """Wait for one of the states; the words beside it."""
        wanted = ", ".join(f'#forget_concept_{name} .fc-state[data-state="{one}"]' for one in states)
        self.page.wait_for_selector(wanted, timeout=LIMIT)
        self.settle()
        return self.text(name)

    def patches(self) -> list[str]:
        return [one["name"] for one in self.host.get("/forget-concept/v1/patches")]


@pytest.fixture(scope="module", params=hosts())
def running(request: pytest.FixtureRequest, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    kind, host = request.param
    if why := missing(host, kind):
        if REQUIRED:
            pytest.fail(why + " (FORGET_CONCEPT_REQUIRE_HOSTS=1 asks for one)")
        pytest.skip(why)
    found = WebUI(host, tmp_path_factory.mktemp(f"tab-{kind}"), kind)
    found.prepare()
    found.second_checkpoint("turned")
    # with a data folder elsewhere Forge does not serve its own scripts
    allowed = ["--gradio-allowed-path", str(host), "--gradio-allowed-path", str(ROOT)] if kind == "forge" else []
    try:
        found.compile()
        found.start(*allowed)
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def opened(running: WebUI, browser: Any) -> Iterator[Tab]:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    found = Tab(running, page)
    found.open()
    yield found
    page.close()


@pytest.fixture()
def tab(opened: Tab) -> Tab:
    """One page for all tests, which opens in seconds; each begins with its first part."""
    opened.complaints.clear()
    opened.go("Forget Concept")
    opened.part("Forget")
    return opened


def test_a_person_makes_the_model_forget_and_sees_it(tab: Tab) -> None:
    asked = {"concept_1": "star", "replacement_1": "circle", "preserve": "moon, heart", "pairs": "2"}
    tab.walk(asked, "start")
    tab.state("state", "queued", "running", "done")
    assert "done" in tab.state("state", "done", "failed")
    tab.page.wait_for_selector("#forget_concept_result figure", timeout=LIMIT)
    pictures = tab.at("result").locator("img")
    found = [pictures.nth(i).get_attribute("alt") for i in range(pictures.count())]
    assert found == [f"{when}: a photo of {what}, seed 0" for what in ("star", "moon") for when in ("before", "after")]
    assert pictures.first.evaluate("(image) => image.naturalWidth") > 0
    assert "star (object), shown as 'circle'" in tab.text("result")
    assert tab.patches() == ["star_00001"]
    # it is in the weights, and the part with the patches says so
    tab.part("Patches")
    assert "star_00001" in tab.text("active") and "yes" in tab.text("active")
    assert tab.value("tag") == "<lora:star_00001:1>"
    card = tab.at("cards").locator(".fc-card")
    assert card.count() == 1 and "in the model" in card.inner_text()
    assert tab.complaints == []


def test_patches_are_put_on_taken_off_renamed_and_deleted_only_when_meant(tab: Tab) -> None:
    tab.part("Patches")
    tab.press("remove_now")
    assert "removed from the loaded model" in tab.text("patch_message")
    tab.page.locator("#forget_concept_patch_strength input[type=number]").fill("0.5")
    tab.press("apply_now")
    assert "0.5" in tab.text("active") and tab.host.get("/forget-concept/v1/active")[0]["strength"] == 0.5
    tab.fill("new_name", "../x")
    tab.press("rename")
    assert "in the loaded model" in tab.text("patch_message") or "slash" in tab.text("patch_message")
    tab.press("clear")
    tab.fill("new_name", "../x")
    tab.press("rename")
    assert "without slashes" in tab.text("patch_message")
    tab.fill("new_name", "kein Stern 星")
    tab.press("rename")
    assert tab.patches() == ["kein Stern 星"]
    # a card is a button: it is reached and pressed by the keyboard
    card = tab.at("cards").locator(".fc-card")
    card.focus()
    tab.page.keyboard.press("Enter")
    tab.settle()
    assert tab.value("tag") == "<lora:kein Stern 星:1>"
    tab.press("delete")
    assert "cannot be undone" in tab.text("sure")
    tab.press("keep")
    assert not tab.seen("sure") and tab.patches() == ["kein Stern 星"]
    tab.press("delete")
    tab.press("really")
    assert tab.patches() == [] and "no patches yet" in tab.text("cards")


def test_a_page_that_is_opened_again_finds_the_job_and_can_interrupt_it(tab: Tab) -> None:
    tab.fill("concept_1", "star")
    tab.choose("method", "Forget-Me-Not")
    tab.box("pairs").fill("0")
    tab.press("start")
    tab.state("state", "queued", "running")
    tab.open()
    tab.state("state", "queued", "running")
    # what was asked for is remembered
    assert tab.value("concept_1") == "star" and tab.value("method").startswith("Forget-Me-Not")
    assert tab.at("start").is_disabled()
    tab.press("stop")
    assert "nothing was saved" in tab.state("state", "cancelled")
    assert tab.patches() == []
    assert tab.at("start").is_enabled()


def test_a_request_goes_in_and_out_as_the_file_that_the_other_doors_read(tab: Tab, tmp_path: Path) -> None:
    given = tmp_path / "request.json"
    given.write_text(json.dumps(REQUEST), encoding="utf-8")
    tab.page.locator("#forget_concept_request > button, #forget_concept_request > .label-wrap").first.click()
    tab.page.locator("#forget_concept_import input[type=file]").set_input_files(str(given))
    tab.page.wait_for_selector("#forget_concept_request_told .fc-notice", timeout=LIMIT)
    assert [tab.value(f"concept_{i}") for i in (1, 2)] == ["star", "van Gogh"] and not tab.seen("line_3")
    assert tab.value("seed") == str(REQUEST["seed"])
    # only the chosen method's own settings are there
    assert tab.at("settings_uce").is_hidden()
    tab.press("export")
    with tab.page.expect_download() as download:
        tab.page.locator("#forget_concept_exported a").first.click()
    written = Path(download.value.path()).read_text(encoding="utf-8")
    assert ForgetRequest.from_json(written) == ForgetRequest.from_json(json.dumps(REQUEST))
    # a line is taken away, and what comes after it moves up
    tab.press("remove_1")
    assert tab.value("concept_1") == "van Gogh" and not tab.seen("line_2")
    bad = tmp_path / "bad.json"
    bad.write_text('{"schema": 1, "concepts": [}', encoding="utf-8")
    tab.page.locator("#forget_concept_import button[aria-label=Clear], #forget_concept_import button").first.click()
    tab.page.locator("#forget_concept_import input[type=file]").set_input_files(str(bad))
    tab.page.wait_for_selector("#forget_concept_request_told .fc-problem", timeout=LIMIT)
    assert "not valid JSON" in tab.text("request_told")


def test_what_is_wrong_is_said_beside_the_button(tab: Tab) -> None:
    for i in range(1, 3):
        if tab.seen(f"line_{i}"):
            tab.fill(f"concept_{i}", "")
            tab.fill(f"replacement_{i}", "")
    tab.press("start")
    assert "Nothing to forget" in tab.text("state")
    assert tab.at("state").locator("[role=alert]").count() == 1
    assert tab.host.get("/forget-concept/v1/jobs")[-1]["state"] != "running"


@pytest.mark.long
def test_an_evaluation_is_read_on_the_page(tab: Tab) -> None:
    tab.choose("method", "Unified Concept Editing")
    tab.choose("preset", "tuned")
    tab.fill("concept_1", "star")
    tab.fill("replacement_1", "circle")
    tab.box("pairs").fill("0")
    tab.press("start")
    assert "done" in tab.state("state", "done", "failed")
    tab.part("Evaluate")
    assert tab.value("evaluated") == "star_00001"
    tab.page.locator("#forget_concept_evaluate_count input[type=number]").fill("4")
    tab.page.locator("#forget_concept_evaluate_steps input[type=number]").fill("4")
    tab.press("evaluate_start")
    tab.state("evaluate_state", "queued", "running", "done")
    assert "done" in tab.state("evaluate_state", "done", "failed")
    tab.page.wait_for_selector("#forget_concept_report_frame iframe", timeout=LIMIT)
    report = tab.page.frame_locator("#forget_concept_report_frame iframe").first
    assert "star" in report.locator("h1").inner_text()
    assert "forgotten" in tab.text("evaluate_words")
    # gradio 4 sets a name and its ending apart
    assert "star_00001.html" in "".join(tab.text("report_files").split())
    assert tab.complaints == []


def test_an_error_stands_alone_and_not_beside_the_last_result(tab: Tab) -> None:
    tab.choose("method", "Unified Concept Editing")
    tab.fill("concept_1", "star")
    tab.box("pairs").fill("0")
    tab.press("start")
    assert "done" in tab.state("state", "done", "failed")
    tab.open()  # a page just opened shows the last job
    assert "saved: forget/star_" in tab.text("result") and "done" in tab.text("state")
    tab.fill("concept_1", "")
    tab.fill("replacement_1", "")
    tab.press("start")
    assert "Nothing to forget" in tab.text("state") and "done" not in tab.text("state")
    assert tab.text("result").strip() == ""
    # and it stays so while another part is used
    tab.part("Patches")
    tab.part("Forget")
    assert "Nothing to forget" in tab.text("state") and tab.text("result").strip() == ""


def test_the_preset_box_offers_what_the_method_has(tab: Tab) -> None:
    def offered() -> list[str]:
        tab.page.locator("#forget_concept_preset input").first.click()
        found = [one.strip().removeprefix("✓").strip() for one in tab.page.locator("ul.options li").all_inner_texts()]
        tab.page.keyboard.press("Tab")  # closes the list; the next click opens it again
        tab.settle()
        return found

    tab.choose("method", "Forget-Me-Not")
    assert offered() == ["published", "published_scaled", "tuned", "steering", "correction", "theme"]
    tab.choose("preset", "theme")
    tab.choose("method", "Unified Concept Editing")
    assert offered() == ["published", "tuned"] and tab.value("preset") == "tuned"


def test_a_theme_is_forgotten_alone_and_remembered_by_its_name(tab: Tab) -> None:
    before = tab.patches()
    tab.box("pairs").fill("0")
    tab.choose("theme", "sea")
    tab.fill("theme_replacement", "circle")
    tab.press("start")
    assert "done" in tab.state("state", "done", "failed")
    (made,) = set(tab.patches()) - set(before)
    told = json.dumps(tab.host.get(f"/forget-concept/v1/patches/{made}"))
    assert all(word in told for word in ("fish", "boat", "anchor", "shell", "sea"))
    tab.open()
    assert tab.value("theme") == "sea" and tab.value("theme_replacement") == "circle"
    assert tab.value("concept_1") == ""


def test_txt2img_and_img2img_say_what_is_in_the_model_and_what_it_lost(tab: Tab) -> None:
    for one in tab.host.get("/forget-concept/v1/active"):  # of the tests before
        tab.host.post(f"/forget-concept/v1/patches/{one['name']}/remove", {})
    tab.host.probe("forget", name="on_badge")
    tab.host.post("/forget-concept/v1/patches/on_badge/apply", {"strength": 0.9})
    for page in ("img2img", "txt2img"):
        tab.go(page)
        tab.badge(page, "on_badge 0.9")
    tab.checkpoint("turned")
    tab.badge("txt2img", "Applied to another checkpoint, not to this one: 'on_badge'")
    tab.checkpoint("forget-concept-mini.safetensors")
    badge = tab.badge("txt2img", "No longer in the model, because its checkpoint was loaded again: 'on_badge'")
    tab.go("Forget Concept")
    tab.part("Patches")
    assert "'on_badge' at strength 0.9" in tab.text("dropped") and "No patch is in" in tab.text("active")
    tab.go("txt2img")
    badge.get_by_role("button", name="Apply again").click()
    tab.badge("txt2img", "on_badge 0.9")
    assert tab.host.get("/forget-concept/v1/active") == [
        {"name": "on_badge", "strength": 0.9, "in_force": True, "warning": ""}
    ]
    tab.go("Forget Concept")
    tab.part("Patches")
    assert tab.text("dropped").strip() == "" and "on_badge" in tab.text("active")
    tab.press("clear")
    tab.go("img2img")
    tab.page.wait_for_function("() => !document.getElementById('forget_concept_badge_img2img').textContent.trim()")
    tab.go("Forget Concept")
    assert tab.complaints == []


def test_a_page_at_rest_asks_for_nothing(tab: Tab) -> None:
    tab.open()  # anew: for 40 s after a change of the checkpoint's menu, as in the test before, it looks again
    tab.page.wait_for_timeout(5000)
    asked: list[str] = []

    def note(request: Any) -> None:
        if "/predict" in request.url:
            asked.append(str(request.post_data)[:200])

    tab.page.on("request", note)
    tab.page.wait_for_timeout(6000)
    tab.page.remove_listener("request", note)
    assert asked == []


def test_a_high_strength_is_commented_on_while_it_is_set(tab: Tab) -> None:
    for part, name in (("Forget", "strength"), ("Patches", "patch_strength"), ("Evaluate", "evaluate_strength")):
        tab.part(part)
        field = tab.page.locator(f"#forget_concept_{name} input[type=number]").first
        field.fill("3")
        field.press("Tab")
        tab.page.locator(f"#forget_concept_{name}_hint").get_by_text("damages what should stay").wait_for(timeout=LIMIT)
        field.fill("1")
        field.press("Tab")
        tab.page.wait_for_function(
            f"() => !document.getElementById('forget_concept_{name}_hint').textContent.trim()", timeout=LIMIT
        )


NAMELESS = """() => [...document.querySelectorAll('#tab_forget_concept input, #tab_forget_concept textarea, \
#tab_forget_concept button')].filter((one) => one.offsetParent && !(one.getAttribute('aria-label') || one.title
  || one.textContent.trim() || (one.labels && [...one.labels].some((label) => label.textContent.trim()))))
  .map((one) => one.outerHTML.slice(0, 160))"""


def test_everything_that_can_be_used_has_a_name(tab: Tab) -> None:
    for part in ("Forget", "Patches", "Evaluate"):
        tab.part(part)
        # names are put on within a beat of the page's script
        tab.page.wait_for_function(f"() => ({NAMELESS})().length === 0", timeout=5000)
