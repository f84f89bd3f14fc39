"""The tab's script on a page that has the webui's elements: what it shows on txt2img and img2img, and when it asks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium

SCRIPT = Path(__file__).resolve().parents[2] / "javascript" / "forget_concept.js"
PAGE = """<!doctype html><body>
<div id="setting_sd_model_checkpoint"><input value="mini.safetensors"></div>
<div id="tabs"><div class="tab-nav"><button>txt2img</button></div></div>
<div id="txt2img_settings"></div><div id="img2img_settings"></div>
<div id="html_info_txt2img"></div>
<div id="tab_forget_concept">
  <div id="forget_concept_state"><div class="fc-state" data-state="idle" data-beat="1" data-say=""></div></div>
  <div id="forget_concept_badge"><div class="fc-badge-content"></div></div>
  <button id="forget_concept_beat"></button><button id="forget_concept_opened"></button>
  <button id="forget_concept_glance"></button><button id="forget_concept_again"></button>
</div>
<script>
  var opts = { sd_checkpoint_hash: "aa" }, pressed = [], loaded = [];
  const gradioApp = () => document, onUiLoaded = (work) => loaded.push(work);
  // the webui calls this with any update of its page
  const onOptionsChanged = (work) => setInterval(work, 500);
  document.addEventListener("click", (event) => { if (event.target.id) pressed.push(event.target.id); });
</script></body>"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture()
def page(browser: Any) -> Iterator[Any]:
    found = browser.new_page()
    found.set_content(PAGE)
    found.add_script_tag(content=SCRIPT.read_text(encoding="utf-8"))
    found.evaluate("() => loaded.forEach((work) => work())")
    found.wait_for_selector("#forget_concept_badge_txt2img", state="attached")
    yield found
    found.close()


def pressed(page: Any, after: int) -> list[str]:
    """The buttons that the script has pressed after so many milliseconds; the list is emptied."""
    page.wait_for_timeout(after)
    return list(page.evaluate("() => pressed.splice(0)"))


def test_a_page_at_rest_asks_for_nothing(page: Any) -> None:
    assert pressed(page, 4000) == []


@pytest.mark.parametrize(
    "change",
    [
        "() => { document.querySelector('#setting_sd_model_checkpoint input').value = 'other.safetensors'; }",
        "() => { opts = { sd_checkpoint_hash: 'bb' }; }",
        "() => { document.getElementById('html_info_txt2img').textContent = 'a star, Steps: 2'; }",
        "() => { document.querySelector('#tabs > .tab-nav button').click(); }",
    ],
    ids=["menu", "loaded", "drawn", "page"],
)
def test_the_model_is_looked_at_again_when_something_has_happened(page: Any, change: str) -> None:
    page.evaluate(change)
    assert "forget_concept_glance" in pressed(page, 3000)


def test_a_checkpoint_takes_time_to_load(page: Any) -> None:
    page.evaluate("() => { document.querySelector('#setting_sd_model_checkpoint input').value = 'other'; }")
    assert pressed(page, 8000).count("forget_concept_glance") >= 3


def test_the_badges_show_what_the_tab_holds_and_their_buttons_are_the_tab_s(page: Any) -> None:
    words = '<div>in the model: no_star 0.9</div><button data-press="forget_concept_again">Apply again</button>'
    page.evaluate("(words) => { document.querySelector('.fc-badge-content').innerHTML = words; }", words)
    for name in ("txt2img", "img2img"):
        badge = page.locator(f"#forget_concept_badge_{name}")
        badge.get_by_text("no_star 0.9").wait_for()
        pressed(page, 0)
        badge.get_by_role("button").click()
        assert pressed(page, 100) == ["forget_concept_again"]
    page.evaluate("() => { document.querySelector('.fc-badge-content').innerHTML = ''; }")
    page.wait_for_function("() => !document.getElementById('forget_concept_badge_txt2img').textContent")
