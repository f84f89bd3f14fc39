"""A page of another site, in a real browser, cannot change anything in a running webui."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from chromium import chromium
from webuihost import PREFIX, WebUI, call, done

REQUEST = {"schema": 1, "concepts": [{"name": "star", "replacement": "circle"}], "pictures": 0, "name": "of_origins"}
# every way in which a page can send a request to another site without asking it first
SEND = """async ([address, body]) => {
    const how = {method: "POST", mode: "no-cors", credentials: "include"};
    const kinds = {none: new Blob([body]), text: body, form: new URLSearchParams({body})};
    for (const kind of Object.keys(kinds))
        await fetch(address, {...how, body: kinds[kind]}).catch(() => null);
    await fetch(address, how).catch(() => null);
    const frame = Object.assign(document.createElement("iframe"), {name: "sink"});
    const form = Object.assign(document.createElement("form"), {
        method: "POST", action: address, target: "sink", enctype: "text/plain",
    });
    form.append(Object.assign(document.createElement("input"), {name: body, value: ""}));
    document.body.append(frame, form);
    form.submit();
    await new Promise((resolve) => { frame.onload = resolve; setTimeout(resolve, 3000); });
}"""


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>another site</title><body>")

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture(scope="module")
def other_site() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def patch(webui: WebUI) -> Iterator[str]:
    code, job = call(webui, "POST", "/forget", {**REQUEST, "apply": 1.0})
    assert code == 202, job
    name = done(webui, job)["result"]["name"]
    yield name
    call(webui, "POST", f"/patches/{name}/remove")
    assert call(webui, "DELETE", f"/patches/{name}")[0] == 204


def _address(webui: WebUI) -> str:
    return f"http://127.0.0.1:{webui.port}"


def _button(webui: WebUI, name: str) -> int:
    """The number by which gradio calls what the button of this id does."""
    with urllib.request.urlopen(_address(webui) + "/config") as answer:
        config = json.load(answer)
    ids = {one["props"].get("elem_id"): one["id"] for one in config["components"]}
    for number, event in enumerate(config["dependencies"]):
        targets = [one[0] if isinstance(one, list) else one for one in event["targets"]]
        if ids[name] in targets and event.get("backend_fn"):
            return number
    raise AssertionError(f"no event of {name}")


def _state(webui: WebUI) -> Any:
    listings = ("/jobs", "/patches", "/active", "/dropped")
    return [[one.get("id", one.get("name")) for one in call(webui, "GET", path)[1]] for path in listings]


def test_no_page_of_another_site_changes_anything(webui: WebUI, patch: str, other_site: str) -> None:
    before = _state(webui)
    assert [patch] == before[2]
    clear = {"fn_index": _button(webui, "forget_concept_clear"), "data": [patch], "session_hash": "abcdefghij"}
    with chromium() as browser:
        page = browser.new_page()
        page.goto(other_site)
        for path in ("/forget", f"/patches/{patch}/apply", f"/patches/{patch}/remove", "/dropped/dismiss"):
            page.evaluate(SEND, [_address(webui) + PREFIX + path, json.dumps(REQUEST)])
        for path in ("/run/predict", "/run/predict/", "/api/predict"):
            page.evaluate(SEND, [_address(webui) + path, json.dumps(clear)])
        assert _state(webui) == before
        # the same from the webui's own page is taken: the test would see it
        own = browser.new_page()
        own.goto(_address(webui))
        sent = """async ([path, body]) => (await fetch(path, {method: "POST", body,
            headers: {"content-type": "application/json"}})).status"""
        assert own.evaluate(sent, ["/run/predict", json.dumps(clear)]) == 200
    assert _state(webui)[2] == []
