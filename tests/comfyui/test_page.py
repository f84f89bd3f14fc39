"""The pack in the page: a real Chromium on a real ComfyUI, with the page that it ships and any other in
COMFYUI_FRONTENDS (folders with an index.html, as comfyui-frontend-package has it in `static`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium
from comfyhost import REQUIRED, ROOT, ComfyUI, found_hosts, missing
from graphs import Graph, from_workflow
from test_workflows import EXAMPLES, on_the_embedded_model

PAGES: list[Path | None] = [None, *(Path(p) for p in os.environ.get("COMFYUI_FRONTENDS", "").split(os.pathsep) if p)]
VIEW = {"width": 1900, "height": 1150}
READY = "() => window.app?.graph && window.app?.extensionManager && window.app.extensionManager.setting"
TOLD = """() => [...document.querySelectorAll('.p-toast-message, .p-dialog, [role=alert]')].map((x) => x.innerText)"""


class Shown:
    """The page of a running host, and what it complained of."""

    def __init__(self, host: ComfyUI, page: Any) -> None:
        self.host, self.page = host, page
        self.complaints: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._logged)

    def _logged(self, message: Any) -> None:
        where = str(message.location.get("url", ""))
        if message.type == "error" and (self.host.pack_name in where or self.host.pack_name in message.text):
            self.complaints.append(message.text)

    def open(self) -> None:
        # a newcomer would be greeted with a dialog
        self.host.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Validation.Workflows": True})
        self.page.goto(f"http://127.0.0.1:{self.host.port}/")
        self.page.wait_for_function(READY, timeout=120_000)
        self.page.wait_for_timeout(3000)

    def load(self, workflow: dict[str, Any]) -> None:
        self.page.evaluate("(w) => window.app.loadGraphData(w)", workflow)
        self.page.wait_for_timeout(700)

    def look_at(self, kind: str) -> None:
        """That node in whole in the view: what is out of it, or small, is not drawn."""
        self.page.evaluate(
            """(kind) => { const canvas = window.app.canvas;
              const node = window.app.graph._nodes.find((one) => one.type === kind);
              canvas.ds.scale = Math.min(1, 1000 / (node.size[1] + 100));
              canvas.ds.offset = [300 - node.pos[0], 60 - node.pos[1]]; canvas.setDirty(true, true) }""",
            kind,
        )

    def told(self) -> list[str]:
        return [words for words in self.page.evaluate(TOLD) if words.strip()]

    def saved(self) -> dict[str, Any]:
        return json.loads(self.page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))

    def prompt(self) -> Graph:
        """The graph as the page sends it, without the titles."""
        found = json.loads(self.page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)"))
        return {key: {"class_type": part["class_type"], "inputs": part["inputs"]} for key, part in found.items()}

    def run(self) -> dict[str, Any]:
        """Press Run, and wait for the end."""
        known = set(self.host.get("/history"))
        self.page.evaluate("() => window.app.queuePrompt(0, 1)")
        for _ in range(600):
            self.page.wait_for_timeout(500)
            for prompt in set(self.host.get("/history")) - known:
                return self.host.wait(prompt)
        raise TimeoutError(self.host.tail())


@pytest.fixture(
    scope="module",
    params=[(host, page) for host in (found_hosts() or [None]) for page in PAGES],
    ids=lambda pair: f"{pair[0].name if pair[0] else 'no-host'}-{pair[1].name if pair[1] else 'own page'}",
)
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    host, frontend = request.param
    if why := missing(host):
        if REQUIRED:
            pytest.fail(why + " (FORGET_CONCEPT_REQUIRE_HOSTS=1 asks for one)")
        pytest.skip(why)
    running = ComfyUI(host, tmp_path_factory.mktemp(f"page-{host.name}"))
    arguments = ("--front-end-root", str(frontend)) if frontend else ()
    with chromium() as browser:
        try:
            running.start(arguments=arguments)
            found = Shown(running, browser.new_page(viewport=VIEW))
            found.open()
            yield found
        finally:
            running.stop()


def embedded(workflow: dict[str, Any]) -> dict[str, Any]:
    """The same workflow with the embedded model's loader in the place of the checkpoint's."""
    changed = json.loads(json.dumps(workflow))
    for entry in changed["nodes"]:
        if entry["type"] == "CheckpointLoaderSimple":
            entry |= {"type": "ForgetConceptLoadEmbeddedModel", "widgets_values": [], "properties": {}}
    return changed


def test_every_node_can_be_put_on_the_canvas(shown: Shown) -> None:
    names = [name for name in shown.host.get("/object_info") if name.startswith("ForgetConcept")]
    made = shown.page.evaluate(
        """(names) => { window.app.graph.clear(); return names.map((name, i) => {
          const node = window.LiteGraph.createNode(name); if (!node) return null;
          node.pos = [(i % 6) * 420, Math.floor(i / 6) * 700]; window.app.graph.add(node); return node.type }) }""",
        names,
    )
    assert made == names
    shown.page.wait_for_timeout(500)
    assert shown.complaints == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_opens_without_a_word_and_is_sent_as_it_is_written(shown: Shown, path: Path) -> None:
    """The page's own validation is on; what it makes of the file is what the other tests run to the last node."""
    workflow = embedded(json.loads(path.read_text(encoding="utf-8")))
    if path.stem == "use_a_saved_patch":  # a file that must be there: else the page warns, as it should
        (wanted,) = [e["widgets_values"][0] for e in workflow["nodes"] if e["type"] == "LoraLoaderModelOnly"]
        place = shown.host.folder / "models" / "loras" / wanted
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    shown.load(workflow)
    assert shown.told() == []
    here = shown.page.evaluate(
        """() => window.app.graph._nodes.map(
          (node) => [String(node.id), node.type, !!window.LiteGraph.registered_node_types[node.type]])"""
    )
    wanted = sorted((str(entry["id"]), entry["type"]) for entry in workflow["nodes"])
    assert sorted((number, kind) for number, kind, _ in here) == wanted
    assert all(known for _, _, known in here), "a node that the page does not know"
    info = shown.host.get("/object_info")
    sent, written = shown.prompt(), from_workflow(workflow, info)
    assert {key: part["class_type"] for key, part in sent.items()} == {
        key: part["class_type"] for key, part in written.items()
    }
    for key, part in written.items():
        inputs = sent[key]["inputs"]
        assert {name: inputs.get(name) for name in part["inputs"]} == part["inputs"]
        # a box that came later has its default; PreviewAny has boxes of the page's own
        known = info[part["class_type"]]["input"]
        boxes = known.get("required", {}) | known.get("optional", {})
        later = boxes.keys() & inputs.keys() - part["inputs"].keys()
        assert all(boxes[name][1]["default"] == inputs[name] for name in later)
    assert shown.complaints == []


def test_before_and_after_have_a_slider_that_keys_move(shown: Shown) -> None:
    """Evaluate Forgetting in the page, to its end: the pictures the host keeps, and nothing of it in the file."""
    workflow = json.loads((ROOT / "example_workflows" / "evaluate_forgetting.json").read_text(encoding="utf-8"))
    small = on_the_embedded_model(from_workflow(workflow, shown.host.get("/object_info")))
    values = {key: {k: v for k, v in part["inputs"].items() if not isinstance(v, list)} for key, part in small.items()}
    shown.load(embedded(workflow))
    shown.page.evaluate(
        """(values) => { for (const node of window.app.graph._nodes) for (const widget of node.widgets ?? []) {
          const value = values[node.id]?.[widget.name]; if (value !== undefined) widget.value = value } }""",
        values,
    )
    before = shown.saved()
    entry = shown.run()
    assert entry["status"]["status_str"] == "success", entry["status"]
    (pairs,) = filter(None, (output.get("forget_concept_pairs") for output in entry["outputs"].values()))
    shown.look_at("ForgetConceptEvaluate")
    slider = shown.page.locator(".forget-concept-pairs")
    slider.wait_for(state="visible")
    assert slider.count() == 1
    pictures = "[...document.querySelectorAll('.forget-concept-pairs img')]"
    shown.page.wait_for_function(f"() => {pictures}.every((image) => image.complete && image.naturalWidth)")
    loaded = f"() => {pictures}.map((image) => [image.naturalWidth, image.src, image.alt])"
    after, first = shown.page.evaluate(loaded)
    assert pairs[0]["before"]["filename"] in first[1] and pairs[0]["after"]["filename"] in after[1]
    assert first[2].endswith(pairs[0]["prompt"])
    handle = slider.locator("input[type=range]")
    handle.focus()
    at = "() => document.querySelector('.forget-concept-pairs .frame').style.getPropertyValue('--at')"
    assert shown.page.evaluate(at) == "50%"
    for key, place in (("ArrowRight", "51%"), ("ArrowLeft", "50%"), ("Home", "0%"), ("End", "100%")):
        shown.page.keyboard.press(key)
        assert shown.page.evaluate(at) == place
    assert handle.get_attribute("aria-valuetext") == "100 % before"
    shown.page.keyboard.press("Tab")
    shown.page.keyboard.press("Enter")  # the picture before the first is the last
    assert pairs[-1]["prompt"] in slider.inner_text()
    slider.locator("button.next").focus()
    shown.page.keyboard.press("Space")
    assert pairs[0]["prompt"] in slider.inner_text()
    assert f"1 / {len(pairs)}" in slider.inner_text()
    # the page itself keeps the text that a node has told, behind the boxes
    boxes = {entry["id"]: entry.get("widgets_values") or [] for entry in before["nodes"]}
    after = shown.saved()
    for entry in after["nodes"]:
        assert (entry.get("widgets_values") or [])[: len(boxes[entry["id"]])] == boxes[entry["id"]]
    sent = shown.prompt()
    assert "before_after" not in json.dumps([after, sent])
    shown.load(after)
    assert shown.told() == []
    again = shown.prompt()
    own = [key for key, part in sent.items() if part["class_type"].startswith("ForgetConcept")]
    assert {key: again[key] for key in own} == {key: sent[key] for key in own}
    assert shown.complaints == []
