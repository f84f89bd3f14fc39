"""The webui's REST routes: every answer has a code that fits and a sentence that helps, and nothing gets out."""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fakewebui import FakeWebui

pytest.importorskip("fastapi", reason="the routes need fastapi, which a webui brings: pip install fastapi httpx")
pytest.importorskip("httpx", reason="calling the routes needs httpx: pip install httpx")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from tiny import fit

from forget_concept.core import mini
from forget_concept.core.errors import RequestError
from forget_concept.core.formats import load_patch
from forget_concept.core.methods.registry import all_methods
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.service.patch_store import patch_store_of
from forget_concept.core.service.uploads import MAX_BYTES, MAX_IMAGES, Uploads
from forget_concept.sd_webui_ext.api import LARGE_BODY, PREFIX, SMALL_BODY, mount

STAR = ForgetRequest((Concept("star", "object", "circle"),), preserve=("moon", "heart"))


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return mini.load()


@pytest.fixture(scope="module")
def patch(model: LatentDiffusion) -> Patch:
    return fit(model, STAR)


@pytest.fixture()
def host(model: LatentDiffusion, tmp_path: Path) -> FakeWebui:
    return FakeWebui(model, tmp_path)


class Client:
    """Calls below the routes' own prefix."""

    def __init__(self, host: FakeWebui, auth: str | None = None) -> None:
        app = FastAPI()
        mount(app, host, auth)
        self.plain = TestClient(app)

    def __call__(self, method: str, path: str, code: int = 200, **given: Any) -> Any:
        answer = self.plain.request(method, PREFIX + path, **given)
        assert answer.status_code == code, answer.text
        if code >= 400:
            (detail,) = answer.json().values()
            assert isinstance(detail, str) and "Traceback" not in answer.text
            return detail
        return answer.json() if answer.headers.get("content-type") == "application/json" else answer.content

    def done(self, job: dict[str, Any]) -> dict[str, Any]:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            job = self("GET", f"/jobs/{job['id']}")
            if job["state"] not in ("queued", "running"):
                return job
            time.sleep(0.2)
        raise AssertionError(job)


@pytest.fixture()
def client(host: FakeWebui) -> Client:
    return Client(host)


def body(**more: Any) -> dict[str, Any]:
    return json.loads(STAR.to_json()) | {"pictures": 0} | more


def test_the_methods_are_those_there_are(client: Client) -> None:
    found = {method["id"]: method for method in client("GET", "/methods")}
    assert list(found) == list(all_methods())
    uce = found["uce"]
    assert uce["presets"]["tuned"]["columns"] == "tail" and not uce["trained"]
    settings = {setting["name"]: setting for setting in uce["settings"]}
    assert settings["projections"]["options"] == ["to_k", "to_v"] and settings["projections"]["kind"] == "list"
    assert all(setting["about"] for method in found.values() for setting in method["settings"])


def test_a_theme_is_listed_and_forgotten(client: Client, host: FakeWebui) -> None:
    folder = host.data_folder() / "themes"
    folder.mkdir(parents=True)
    (folder / "night.txt").write_text("# The night\nstar\nmoon -> tree\n", encoding="utf-8")
    found = {theme["name"]: theme for theme in client("GET", "/themes")}
    assert found["night"] == {"name": "night", "about": "The night", "concepts": ["star", "moon"]}
    assert {"weapons", "watermarks", "self-harm"} <= set(found)
    asked = {"schema": 1, "theme": "night", "theme_replacement": "circle", "pictures": 0}
    job = client.done(client("POST", "/forget", 202, json=asked))
    assert job["state"] == "done", job
    concepts = job["result"]["request"]["concepts"]
    assert [(one["name"], one["replacement"]) for one in concepts] == [("star", "circle"), ("moon", "tree")]
    assert "'fun' is not known" in client("POST", "/forget", 400, json=asked | {"theme": "fun"})


def test_a_patch_is_made_put_on_changed_taken_off_and_deleted(client: Client, host: FakeWebui, patch: Patch) -> None:
    host.chosen["forget_concept_steps"] = 2
    job = client("POST", "/forget", 202, json=body(apply=0.5, pictures=1, name="mine"))
    assert job["kind"] == "forget" and job["title"] == "forgetting 'star'"
    job = client.done(job)
    assert (job["state"], job["error"], job["pictures"]) == ("done", "", 1)
    assert job["result"]["name"] == "mine_00001" and job["result"]["applied"]
    assert ForgetRequest.from_json(json.dumps(job["result"]["request"])) == STAR
    made = load_patch(host.lora_folder() / job["result"]["file"])
    assert all(torch.equal(made.factors[k].up, f.up) for k, f in patch.factors.items())
    picture = client("GET", f"/jobs/{job['id']}/pictures/1")
    from PIL import Image

    assert Image.open(io.BytesIO(picture)).size == (256, 128)
    assert "no pair of pictures 2" in client("GET", f"/jobs/{job['id']}/pictures/2", 404)
    (entry,) = client("GET", "/patches")
    assert entry["name"] == "mine_00001" and entry["concepts"] == ["star"] and entry["lora"] == "<lora:mine_00001:1>"
    details = client("GET", "/patches/mine_00001")
    assert details["layers"] == len(patch) and "star (object), shown as 'circle'" in details["words"]
    assert client("GET", "/active") == [{"name": "mine_00001", "strength": 0.5, "in_force": True, "warning": ""}]
    assert client("POST", "/patches/mine_00001/apply", json={"strength": 0.75})[0]["strength"] == 0.75
    assert "remove it there first, then delete it" in client("DELETE", "/patches/mine_00001", 400)
    assert "remove it there first, then rename it" in client(
        "POST", "/patches/mine_00001/rename", 400, json={"name": "x"}
    )
    assert client("POST", "/patches/mine_00001/remove") == []
    assert "is not in the loaded model" in client("POST", "/patches/mine_00001/remove", 404)
    assert client("POST", "/patches/mine_00001/rename", json={"name": "星"})["name"] == "星"
    assert client("POST", "/patches/星/apply")[0] == {"name": "星", "strength": 1.0, "in_force": True, "warning": ""}
    assert client("POST", "/patches/星/remove") == []
    client("DELETE", "/patches/星", 204)
    assert client("GET", "/patches") == [] and list(host.lora_folder().rglob("*.*")) == []


def test_a_patch_that_was_dropped_is_listed_and_applied_again(client: Client, host: FakeWebui, patch: Patch) -> None:
    patch_store_of(host).library.save(patch, "one", "")
    client("POST", "/patches/one_00001/apply", json={"strength": 0.5})
    assert client("GET", "/dropped") == []
    host.load("embedded.safetensors [0000]")
    lost = {"name": "one_00001", "strength": 0.5, "checkpoint": "embedded.safetensors", "same": True}
    assert client("GET", "/dropped") == [lost] and client("GET", "/active") == []
    assert [one["strength"] for one in client("POST", "/dropped/apply")] == [0.5]
    assert client("GET", "/dropped") == []
    host.load("other.safetensors")
    assert client("GET", "/dropped") == [lost | {"same": False}]
    assert client("POST", "/dropped/dismiss") == [] and client("GET", "/active") == []


def test_a_high_strength_is_applied_with_a_warning(client: Client, host: FakeWebui, patch: Patch) -> None:
    patch_store_of(host).library.save(patch, "one", "")
    assert client("POST", "/patches/one_00001/apply", json={"strength": 1.5})[0]["warning"] == ""
    assert "damages what should stay" in client("POST", "/patches/one_00001/apply", json={"strength": 3})[0]["warning"]
    client("POST", "/patches/one_00001/remove")


def test_patches_are_combined(client: Client, host: FakeWebui, patch: Patch) -> None:
    library = patch_store_of(host).library
    library.save(patch, "one", "")
    library.save(patch, "two", "")
    parts = [{"name": "one_00001"}, {"name": "two_00001", "strength": -0.5}]
    entry = client("POST", "/patches/combine", 201, json={"parts": parts, "name": "both"})
    assert entry["name"] == "both_00001" and entry["method"] == "combined" and entry["concepts"] == ["star"]
    key = next(iter(patch.factors))
    torch.testing.assert_close(library.load("both_00001").factors[key].delta(), 0.5 * patch.factors[key].delta())
    assert "at least two" in client("POST", "/patches/combine", 400, json={"parts": parts[:1]})
    assert "no patch 'x'" in client("POST", "/patches/combine", 404, json={"parts": [*parts, {"name": "x"}]})


def test_an_evaluation_can_be_read_as_page_and_figures(client: Client, host: FakeWebui, patch: Patch) -> None:
    patch_store_of(host).library.save(patch, "", "")
    job = client.done(client("POST", "/evaluate", 202, json={"patch": "star_00001", "count": 4, "steps": 2}))
    assert (job["state"], job["error"]) == ("done", "")
    assert client("GET", "/reports") == [job["result"]["report"]] == ["star_00001"]
    assert client("GET", "/reports/star_00001.html")[:15].lower() == b"<!doctype html>"
    assert client("GET", "/reports/star_00001.json")["evaluations"][0]["concept"] == "star"
    assert "no report" in client("GET", "/reports/moon_00001.html", 404)
    assert "no patch 'moon'" in client("POST", "/evaluate", 404, json={"patch": "moon"})
    for place in ("/etc", "C:\\clip", "../clip", "\\\\host\\share", "clip", "a/../b", "org/name/more"):
        asked = {"patch": "star_00001", "clip_judge": place}
        assert "the API reads no folders" in client("POST", "/evaluate", 400, json=asked)


def test_one_job_at_a_time(client: Client, host: FakeWebui) -> None:
    with host.queue:
        job = client("POST", "/forget", 202, json=body())
        assert job["state"] == "queued"
        assert "Another job is running" in client("POST", "/forget", 409, json=body())
        assert "Another job is running" in client("POST", "/evaluate", 409, json={"patch": "any"})
        assert client("POST", f"/jobs/{job['id']}/cancel")["stopping"]
    assert client.done(job)["state"] == "cancelled"
    assert [one["id"] for one in client("GET", "/jobs")] == [job["id"]]
    assert "There is no job" in client("GET", "/jobs/0123", 404)
    assert "There is no job" in client("POST", "/jobs/0123/cancel", 404)
    assert client("GET", "/patches") == []


# -- what is wrong is said ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"concepts": []}, 400, "Nothing to forget"),
        ({"concepts": [{"name": "  "}]}, 400, "A concept is empty"),
        ({"concepts": [{"name": "star", "kind": "thing"}]}, 400, "unknown kind 'thing'"),
        ({"concepts": "star"}, 422, "'concepts'"),
        ({"concepts": [{"kind": "style"}]}, 422, "'concepts.0.name'"),
        ({"preserve": ["star"]}, 400, "preserve list"),
        ({"concepts": [{"name": "(star:1.3)", "replacement": "circle"}]}, 400, "write 'star'"),
        ({"concepts": [{"name": "star", "replacement": "<lora:disc:1>"}]}, 400, "replacement of 'star'"),
        ({"preserve": ["moon", "__animal__"]}, 400, "preserve list '__animal__' is a wildcard"),
        ({"settings": {"preserve_prompts": ["a moon AND a tree"]}}, 400, "write 'a moon and a tree'"),
        ({"schema": 2}, 400, "schema 2"),
        ({"method": "magic"}, 400, "'magic' is not known"),
        ({"preset": "best"}, 400, "no preset 'best'"),
        ({"settings": {"rank": "high"}}, 400, "'rank' must be"),
        ({"settings": {"rank": {"a": 1}}}, 400, "'rank' must be"),
        ({"settings": [1]}, 422, "'settings'"),
        ({"strength": 0}, 400, "strength"),
        ({"strength": "much"}, 422, "'strength'"),
        ({"seed": -1}, 400, "seed"),
        ({"apply": 0}, 400, "strength"),
        ({"pictures": 99}, 400, "picture pairs"),
        ({"name": "../../out"}, 400, "not inside the Lora folder"),
        ({"name": "/etc/out"}, 400, "not inside the Lora folder"),
    ],
)
def test_a_request_that_is_wrong_is_answered_in_words(
    client: Client, host: FakeWebui, change: dict, code: int, words: str
) -> None:
    assert words in client("POST", "/forget", code, json=body(**change))
    assert client("GET", "/jobs") == [] and list(host.lora_folder().rglob("*")) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"star"',
        b"\xff\xfe",
        b"[" * 20000,
        b'{"concepts": [{"name": "star"}], "strength": NaN}',
        b'{"concepts": [{"name": "star"}], "strength": Infinity}',
        b'{"concepts": [{"name": "star"}], "seed": 1e999}',
    ],
)
def test_a_body_that_is_no_request_is_a_4xx_in_words(client: Client, content: bytes) -> None:
    answer = client.plain.post(PREFIX + "/forget", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert isinstance(answer.json()["detail"], str) and len(answer.json()["detail"]) < 300
    assert client("GET", "/jobs") == []


def test_a_body_that_is_no_json_is_not_taken_for_some(client: Client) -> None:
    """A page of another site may post text to a webui on this machine, but no JSON."""
    answer = client.plain.post(PREFIX + "/forget", content=json.dumps(body()), headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    assert client("GET", "/jobs") == []


@pytest.mark.parametrize(
    "name", ["..", "../star", "..%2f..%2fetc%2fpasswd", "%2e%2e", "C:%5cstar", "con", "a%00b", "star"]
)
def test_a_name_is_looked_up_and_never_a_path(client: Client, host: FakeWebui, name: str) -> None:
    (host.folder / "star.safetensors").write_bytes(b"outside")
    for method, path in (
        ("GET", f"/patches/{name}"),
        ("DELETE", f"/patches/{name}"),
        ("POST", f"/patches/{name}/apply"),
        ("POST", f"/patches/{name}/remove"),
        ("GET", f"/reports/{name}.html"),
    ):
        assert client.plain.request(method, PREFIX + path).status_code in (404, 405)
    assert (host.folder / "star.safetensors").read_bytes() == b"outside"


def test_a_body_that_is_too_large_is_refused_said_or_not(client: Client) -> None:
    many, headers = json.dumps({"name": "x" * SMALL_BODY}), {"content-type": "application/json"}
    assert "too large" in client("POST", "/patches/any/rename", 413, content=many, headers=headers)

    def parts():
        for _ in range(SMALL_BODY // 1000 + 1):
            yield b"x" * 1000

    assert "too large" in client("POST", "/patches/combine", 413, content=parts(), headers=headers)
    # with pictures more is taken, and not without end
    assert SMALL_BODY < LARGE_BODY
    heavy = {"content-length": str(LARGE_BODY + 1), **headers}
    assert "too large" in client("POST", "/forget", 413, content=b"{}", headers=heavy)


# -- pictures -------------------------------------------------------------------------------------------------------


def picture(kind: str = "PNG", size: tuple[int, int] = (128, 128), colour: str = "red") -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_comes_in_as_base64_and_is_gone_afterwards(kind: str) -> None:
    for text in (picture(kind), f"data:image/{kind.lower()};base64,{picture(kind)}"):
        uploads = Uploads({0: [text]})
        (place,) = uploads.places[0]
        assert Path(place).read_bytes() == base64.b64decode(picture(kind))
        uploads.remove()
        assert not Path(place).parent.exists()
        uploads.remove()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/etc/passwd", "another kind, or damaged|not base64"),
        ("not base64!", "not base64"),
        (base64.b64encode(b"GIF89a" + b"\0" * 100).decode(), "another kind, or damaged"),
        (picture("BMP"), "another kind, or damaged"),
        (picture("PNG")[:100], "cannot be read as a picture|not base64"),
        ("A" * (MAX_BYTES * 4 // 3 + 5), "too large"),
        (picture("PNG", (20000, 2001), "white"), "at most 40,000,000"),
    ],
)
def test_what_is_no_picture_is_named(text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Uploads({1: [text]})


def test_too_many_pictures_are_refused() -> None:
    with pytest.raises(RequestError, match="at most"):
        Uploads({0: ["x"] * (MAX_IMAGES + 1)})


def test_pictures_are_for_methods_that_look_at_some(client: Client) -> None:
    concepts = [{"name": "star", "images": [picture(), picture(), picture()]}]
    assert "works from words alone" in client("POST", "/forget", 400, json=body(concepts=concepts))
    few = [{"name": "star", "images": [picture(), picture()]}]
    job = client.done(client("POST", "/forget", 202, json=body(concepts=few, method="forget_me_not")))
    assert job["state"] == "failed" and "too few pictures of 'star'" in job["error"]
    # what a server has on its disk is nobody's business: a place is no picture
    places = [{"name": "star", "images": ["/etc/passwd"]}]
    client("POST", "/forget", 400, json=body(concepts=places, method="forget_me_not"))


# -- who is let in --------------------------------------------------------------------------------------------------


def test_with_api_auth_nobody_comes_in_without_the_password(host: FakeWebui) -> None:
    client = Client(host, "ann:secret, bob:a:b")
    routes = client("GET", "/openapi.json", auth=("ann", "secret"))["paths"]
    assert len(routes) >= 15
    for path, methods in routes.items():
        for method in methods:
            place = path.format(name="x", job_id="x", number=1)
            answer = client.plain.request(method, place)
            assert answer.status_code == 401, (method, place)
            assert answer.headers["www-authenticate"].startswith("Basic")
    for wrong in (("ann", "wrong"), ("ann", ""), ("bob", "secret"), ("", ""), ("secret", "ann"), ("ann", "secret2")):
        assert client.plain.get(PREFIX + "/patches", auth=wrong).status_code == 401
    assert client("GET", "/patches", auth=("ann", "secret")) == []
    assert client("GET", "/patches", auth=("bob", "a:b")) == []
    assert client.plain.get(PREFIX + "/openapi.json").status_code == 401


@pytest.mark.parametrize("auth", ["", "ann", "ann:secret,,", ":secret"])
def test_a_password_that_is_none_lets_nobody_in(host: FakeWebui, auth: str) -> None:
    app = FastAPI()
    with pytest.raises(RequestError, match="user:password"):
        mount(app, host, auth)
    assert TestClient(app).get(PREFIX + "/patches").status_code == 404


def test_every_route_is_described(client: Client) -> None:
    schema = client("GET", "/openapi.json")
    for path, methods in schema["paths"].items():
        assert path.startswith(PREFIX)
        for name, route in methods.items():
            assert route["summary"] and len(route["description"]) > 15, (name, path)
            assert {"400", "401", "409", "413"} <= set(route["responses"])
    fields = schema["components"]["schemas"]["ForgetBody"]["properties"]
    assert all(field.get("description") for field in fields.values())
    assert "schema" in fields and "schema_version" not in fields
    assert PREFIX + "/forget" in client.plain.get("/openapi.json").json()["paths"]
