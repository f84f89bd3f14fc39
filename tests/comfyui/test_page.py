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
from workflows import BLUEPRINT

PAGES: list[Path | None] = [None, *(Path(p) for p in os.environ.get("COMFYUI_FRONTENDS", "").split(os.pathsep) if p)]
VIEW = {"width": 1920, "height": 1080}
CANVASES = ("classic", "nodes 2.0")
READY = "() => window.app?.graph && window.app?.extensionManager && window.app.extensionManager.setting"
TOLD = """() => [...document.querySelectorAll('.p-toast-message, .p-dialog, [role=alert]')].map((x) => x.innerText)"""


class Shown:
    """The page of a running host, and what it complained of."""

    def __init__(self, host: ComfyUI, page: Any) -> None:
        self.host, self.page = host, page
        self.complaints: list[str] = []
        self.canvas = ""
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._logged)

    def _logged(self, message: Any) -> None:
        where = str(message.location.get("url", ""))
        if message.type == "error" and (self.host.pack_name in where or self.host.pack_name in message.text):
            self.complaints.append(message.text)

    def open(self, canvas: str = "classic") -> None:
        """Open the page with the ``classic`` canvas or with ``nodes 2.0``."""
        if canvas == self.canvas:
            return
        self.canvas = canvas
        # a newcomer would be greeted with a dialog
        settings = {"Comfy.TutorialCompleted": True, "Comfy.Validation.Workflows": True}
        self.host.post("/settings", settings | {"Comfy.VueNodes.Enabled": canvas == "nodes 2.0"})
        self.page.goto(f"http://127.0.0.1:{self.host.port}/", timeout=300_000)
        self.page.wait_for_function(READY, timeout=300_000)
        self.page.wait_for_timeout(6000)

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
    shown.open()
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


# [type, title, left, top, right, bottom, whether the title is cut] of every node, in the canvas's units
PLACES = """() => window.app.graph._nodes.map((node) => {
  const [x, y] = node.pos, title = window.LiteGraph.NODE_TITLE_HEIGHT;
  const element = document.querySelector(`[data-node-id="${node.id}"]`);
  let [width, height] = [node.size[0], node.size[1]], cut = false;
  if (element) {
    [width, height] = [element.offsetWidth, element.offsetHeight - title];
    const head = element.querySelector('[data-testid="node-title"]') ?? element.querySelector('.lg-node-header');
    const text = head && [head, ...head.querySelectorAll('*')].find((one) => one.scrollWidth > one.clientWidth + 1
      && getComputedStyle(one).overflow !== 'visible' && getComputedStyle(one).display !== 'inline');
    cut = !!text;
  } else {
    const paper = document.createElement('canvas').getContext('2d');
    paper.font = `${window.LiteGraph.NODE_TEXT_SIZE}px Arial`;
    cut = paper.measureText(node.getTitle()).width > width - 2 * title;
  }
  return [node.type, node.getTitle(), x, y - title, x + width, y + height, cut] })"""


@pytest.mark.parametrize("canvas", CANVASES)
def test_a_node_is_as_high_as_what_it_shows(shown: Shown, canvas: str) -> None:
    """No holes where rare boxes are hidden; a settings node has at most eight rows, Show Advanced shows the rest."""
    shown.open(canvas)
    names = [name for name in shown.host.get("/object_info") if name.startswith("ForgetConcept")]
    shown.page.evaluate(
        """(names) => { window.app.graph.clear(); names.forEach((name, i) => {
          const node = window.LiteGraph.createNode(name);
          node.pos = [(i % 8) * 520, Math.floor(i / 8) * 800]; window.app.graph.add(node) });
          const { canvas } = window.app; canvas.ds.scale = 0.4; canvas.ds.offset = [50, 80];
          canvas.setDirty(true, true) }""",
        names,
    )
    shown.page.wait_for_timeout(2500)
    rows = """() => window.app.graph._nodes.map((node) => {
      const usual = (node.widgets ?? []).filter((one) => !one.options?.advanced);
      const tall = usual.filter((one) => one.options?.multiline || one.element || one.inputEl).length;
      const sockets = Math.max(node.outputs.length, node.inputs.filter((one) => !one.widget).length);
      return [node.type, usual.length, 75 + 24 * sockets + 30 * usual.length + 50 * tall] })"""
    most = {kind: (count, height) for kind, count, height in shown.page.evaluate(rows)}
    assert len(most) == len(names)
    for kind, _, _, top, _, bottom, _ in shown.page.evaluate(PLACES):
        count, height = most[kind]
        assert bottom - top <= height, f"{kind} is {bottom - top:.0f} high, and shows {count} rows"
        assert not kind.endswith("Settings") or count <= 8
    small = {place[0]: place[5] - place[3] for place in shown.page.evaluate(PLACES)}
    kind = "ForgetConceptSelectiveAmnesiaSettings"
    shown.page.evaluate("(kind) => window.app.graph._nodes.find((one) => one.type === kind).toggleAdvanced()", kind)
    shown.page.wait_for_timeout(1000)
    opened = {place[0]: place[5] - place[3] for place in shown.page.evaluate(PLACES)}[kind]
    assert opened > small[kind] + 400, "Show Advanced does not show the rest"
    assert shown.complaints == []


def overlaps(a: list[float], b: list[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("canvas", CANVASES)
def test_every_example_can_be_read(shown: Shown, canvas: str) -> None:
    """Nothing lies on something else, titles are whole, and the whole fits a full-HD page at 60 % or more."""
    shown.open(canvas)
    wrong = []
    for path in EXAMPLES:
        shown.load(embedded(json.loads(path.read_text(encoding="utf-8"))))
        shown.page.evaluate(
            """() => { const { ds } = window.app.canvas; ds.scale = 0.5; ds.offset = [120, 160];
              window.app.canvas.setDirty(true, true) }"""
        )
        shown.page.wait_for_timeout(1500)
        places = shown.page.evaluate(PLACES)
        boxes = [(title, box) for _, title, *box, _ in places]
        for i, (title, box) in enumerate(boxes):
            wrong += [f"{path.stem}: {title} lies on {other}" for other, o in boxes[:i] if overlaps(box, o)]
        wrong += [f"{path.stem}: the title {title} is cut" for _, title, *_, cut in places if cut]
        groups = shown.page.evaluate(
            "() => window.app.graph._groups.map((one) => [one.title, one.pos[0], one.pos[1], "
            "one.pos[0] + one.size[0], one.pos[1] + one.size[1]])"
        )
        assert len(groups) == 3
        for i, (title, *box) in enumerate(groups):
            wrong += [f"{path.stem}: group {title} lies on {other}" for other, *o in groups[:i] if overlaps(box, o)]
        for title, box in boxes:
            if not any(g[1] <= box[0] and g[2] <= box[1] and g[3] >= box[2] and g[4] >= box[3] for g in groups):
                wrong.append(f"{path.stem}: {title} is in no group, or sticks out of it")
        width = max(g[3] for g in groups) - min(g[1] for g in groups)
        height = max(g[4] for g in groups) - min(g[2] for g in groups)
        scale = shown.page.evaluate(
            """async () => { await window.app.extensionManager.command.execute('Comfy.Canvas.FitView');
              await new Promise((done) => setTimeout(done, 1200)); return window.app.canvas.ds.scale }"""
        )
        # the page shows all of it at 75 % of its window; the bars beside the canvas take some more
        fits = min((VIEW["width"] - 120) / width, (VIEW["height"] - 120) / height)
        if fits < 0.6:
            wrong.append(f"{path.stem} fits at {fits:.2f} (the page's own choice is {scale:.2f})")
    assert wrong == []
    assert shown.complaints == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_opens_without_a_word_and_is_sent_as_it_is_written(shown: Shown, path: Path) -> None:
    """The page's own validation is on; what it makes of the file is what the other tests run to the last node."""
    workflow = embedded(json.loads(path.read_text(encoding="utf-8")))
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
        if part["class_type"] == "MarkdownNote":
            continue
        inputs = sent[key]["inputs"]
        assert {name: inputs.get(name) for name in part["inputs"]} == part["inputs"]
        # a box that came later has its default; PreviewAny has boxes of the page's own
        known = info[part["class_type"]]["input"]
        boxes = known.get("required", {}) | known.get("optional", {})
        later = boxes.keys() & inputs.keys() - part["inputs"].keys()
        assert all(boxes[name][1]["default"] == inputs[name] for name in later)
    assert shown.complaints == []


def test_the_blueprint_sends_its_words_to_the_node(shown: Shown) -> None:
    workflow = json.loads(BLUEPRINT.read_text(encoding="utf-8"))
    shown.load(workflow)
    assert shown.told() == []
    (part,) = shown.prompt().values()
    assert part["class_type"] == "ForgetConcept"
    assert (part["inputs"]["concept"], part["inputs"]["method"]) == ("star", "uce")
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
