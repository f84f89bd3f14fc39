"""The REST routes of a running webui: a patch from the request to the picture and back, and who is let in."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from tiny import fit
from webuihost import PREFIX, WebUI, call, done

from forget_concept.core import mini
from forget_concept.core.formats import load_patch
from forget_concept.core.request.request import ForgetRequest

PROMPT = "a photo of a red star"
# the file that the command line and ComfyUI's node read too
REQUEST = """{
  "schema": 1,
  "concepts": [{"name": "star", "kind": "object", "replacement": "circle"}],
  "preserve": ["moon", "heart"],
  "method": "uce",
  "preset": "tuned",
  "settings": {},
  "strength": 1.0,
  "seed": 0
}"""


@pytest.fixture()
def patch(webui: WebUI) -> Any:
    """A patch made here, in the Lora folder; gone afterwards."""
    code, job = call(webui, "POST", "/forget", json.loads(REQUEST) | {"pictures": 1, "name": "from_rest"})
    assert code == 202, job
    job = done(webui, job)
    assert (job["state"], job["error"]) == ("done", "")
    yield job["result"]
    for one in call(webui, "GET", "/active")[1]:
        call(webui, "POST", f"/patches/{one['name']}/remove")
    assert call(webui, "DELETE", f"/patches/{job['result']['name']}")[0] == 204


def test_the_same_request_gives_the_command_line_s_patch(webui: WebUI, patch: dict[str, Any]) -> None:
    """Through this webui's own text encoder: the weights differ by the rounding of its arithmetic alone."""
    own = load_patch(webui.loras / patch["file"])
    here = fit(mini.load(), ForgetRequest.from_json(REQUEST))
    assert own.factors.keys() == here.factors.keys()
    worst = max(float((own.factors[k].delta() - f.delta()).abs().max()) for k, f in here.factors.items())
    size = max(float(f.delta().abs().max()) for f in here.factors.values())
    print(f"largest difference of a weight {worst:.3g}, largest change {size:.3g}")
    assert worst < 2e-3 * size
    assert own.metadata["forget_concept.request"] == here.metadata["forget_concept.request"]
    assert own.metadata["forget_concept.base_model"] == here.metadata["forget_concept.base_model"]
    beside = webui.loras / patch["file"]
    assert beside.with_suffix(".preview.png").is_file()
    assert json.loads(beside.with_suffix(".json").read_text(encoding="utf-8"))["preferred weight"] == 1.0


def test_a_patch_is_put_on_and_taken_off_and_the_picture_is_what_it_was(webui: WebUI, patch: dict[str, Any]) -> None:
    name = patch["name"]
    assert any(one["name"] == name for one in call(webui, "GET", "/patches")[1])
    plain = webui.draw(PROMPT)
    code, active = call(webui, "POST", f"/patches/{name}/apply", {"strength": 0.9})
    assert (code, active) == (200, [{"name": name, "strength": 0.9, "in_force": True, "warning": ""}])
    assert webui.draw(PROMPT).pixels != plain.pixels
    code, words = call(webui, "DELETE", f"/patches/{name}")
    assert code == 400 and "remove it there" in words["detail"]
    assert call(webui, "POST", f"/patches/{name}/remove") == (200, [])
    assert webui.draw(PROMPT).pixels == plain.pixels
    # the webui itself finds the new file, under the name that it is given
    typed = webui.draw(f"{PROMPT} {patch['lora']}")
    assert typed.pixels != plain.pixels and name in typed.infotext


def test_a_job_can_be_interrupted_and_saves_nothing(webui: WebUI) -> None:
    before = sorted(webui.loras.rglob("*"))
    body = json.loads(REQUEST) | {"method": "forget_me_not", "pictures": 0}
    code, job = call(webui, "POST", "/forget", body)
    assert code == 202
    assert call(webui, "POST", "/forget", body)[0] == 409
    call(webui, "POST", f"/jobs/{job['id']}/cancel")
    assert done(webui, job)["state"] == "cancelled"
    assert sorted(webui.loras.rglob("*")) == before
    webui.draw("")  # the queue is free again


@pytest.mark.parametrize(
    ("method", "path", "body", "codes"),
    [
        ("POST", "/forget", b"{", (400, 422)),
        ("POST", "/forget", b"[" * 5000, (400, 422)),
        ("POST", "/forget", {"concepts": []}, (400,)),
        ("POST", "/forget", {"concepts": [{"name": "star", "images": ["/etc/passwd"]}]}, (400,)),
        ("POST", "/forget", {"concepts": [{"name": "star"}], "name": "../../out"}, (400,)),
        ("POST", "/patches/..%2f..%2fconfig/apply", {}, (404,)),
        ("GET", "/patches/config", None, (404,)),
        ("POST", "/patches/x/rename", {"name": "x" * 300_000}, (413,)),
        ("POST", "/evaluate", {"patch": "nothing"}, (404,)),
        ("GET", "/jobs/nothing", None, (404,)),
    ],
)
def test_what_is_wrong_is_told_in_words(
    webui: WebUI, method: str, path: str, body: Any, codes: tuple[int, ...]
) -> None:
    code, answer = call(webui, method, path, body)
    assert code in codes, answer
    assert isinstance(answer["detail"], str) and len(answer["detail"]) > 8
    assert "Traceback" not in webui.tail(10)


def test_the_routes_are_described_beside_the_webui_s_own(webui: WebUI) -> None:
    paths = webui.get("/openapi.json")["paths"]
    assert {PREFIX + "/forget", PREFIX + "/patches/{name}/apply", "/sdapi/v1/txt2img"} <= set(paths)
    assert call(webui, "GET", "/openapi.json")[1]["info"]["title"] == "Forget Concept"


def test_with_api_auth_an_anonymous_call_gets_401(stopped: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    basic = {"Authorization": "Basic " + base64.b64encode(b"ann:secret").decode()}
    # whether it is up is asked with the login too
    monkeypatch.setattr(
        stopped,
        "raw",
        lambda path: stopped.send(urllib.request.Request(f"http://127.0.0.1:{stopped.port}{path}", headers=basic)),
    )
    stopped.start("--api-auth", "ann:secret")
    schema = call(stopped, "GET", "/openapi.json", login="ann:secret")[1]
    for path, methods in schema["paths"].items():
        for method in methods:
            place = path.removeprefix(PREFIX).format(name="x", job_id="x", number=1)
            body = {} if method in ("post", "delete") else None
            assert call(stopped, method.upper(), place, body)[0] == 401, (method, path)
            assert call(stopped, method.upper(), place, body, "ann:wrong")[0] == 401, (method, path)
    assert call(stopped, "GET", "/patches", login="ann:secret") == (200, [])
