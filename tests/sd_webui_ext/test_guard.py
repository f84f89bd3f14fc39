"""Who may send requests: the webui's own pages and programs, with a password where there is one, and nothing else."""

from __future__ import annotations

import base64
import json
import time
import tracemalloc

import pytest
from fakewebui import FakeWebui

pytest.importorskip("fastapi", reason="the routes need fastapi, which a webui brings: pip install fastapi httpx")
pytest.importorskip("httpx", reason="calling the routes needs httpx: pip install httpx")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from forget_concept.core import mini
from forget_concept.core.errors import RequestError
from forget_concept.sd_webui_ext.api import PREFIX, mount
from forget_concept.sd_webui_ext.guard import Credentials, foreign_host, foreign_origin

JSON = {"content-type": "application/json"}
OWN = {"host": "127.0.0.1:7860"}


@pytest.fixture(scope="module")
def model():
    return mini.load()


@pytest.fixture()
def host(model, tmp_path):
    return FakeWebui(model, tmp_path)


def client(host, auth=None, origins=()):
    app = FastAPI()
    mount(app, host, auth, origins)
    return TestClient(app, base_url="http://127.0.0.1:7860", raise_server_exceptions=False)


def routes(http, **given):
    """Every route that changes something: method and a path of it."""
    paths = http.get(PREFIX + "/openapi.json", **given).json()["paths"]
    return [
        (method.upper(), path.format(name="any", job_id="any", number=1))
        for path, one in paths.items()
        for method in one
        if method in ("post", "put", "delete", "patch")
    ]


FOREIGN = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://["},
    {"origin": "http://[::1"},
    {"origin": "//"},
    {"origin": "http://127.0.0.1:8000"},  # another program on the same computer
    {"origin": "http://127.0.0.1"},
    {"origin": "http://127.0.0.1:7860.evil.example"},
    {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
    {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site"},
    {"host": "evil.example"},
    {"host": "evil.example:7860", "origin": "http://evil.example:7860", "sec-fetch-site": "same-origin"},
]


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded", None])
def test_no_page_of_another_site_changes_anything(host, headers, kind):
    http = client(host)
    found = routes(http)
    assert len(found) >= 10
    for method, path in found:
        more = {} if kind is None else {"content-type": kind}
        answer = http.request(method, path, content=b"{}", headers={**headers, **more})
        assert answer.status_code == 403, (method, path, answer.text)
        assert answer.json()["detail"].count(".") >= 1
    assert http.get(PREFIX + "/jobs").json() == []


def test_a_foreign_host_name_reads_nothing_either(host):
    http = client(host)
    assert http.get(PREFIX + "/patches", headers={"host": "evil.example"}).status_code == 403
    for name in ("localhost:7860", "[::1]:7860", "192.168.1.5", "studio", "studio.local:7860", "abc.gradio.live"):
        assert http.get(PREFIX + "/patches", headers={"host": name}).status_code == 200, name
    host.chosen["forget_concept_hosts"] = "studio.example.org, evil.example"
    assert http.get(PREFIX + "/patches", headers={"host": "evil.example"}).status_code == 200
    # where there is a password, a page with another name has none to send
    guarded = client(host, "ann:secret")
    assert guarded.get(PREFIX + "/patches", headers={"host": "any.example"}, auth=("ann", "secret")).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://127.0.0.1:7860"},
        {"origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin"},
        # behind a proxy that changes the host name
        {"origin": "https://studio.example.org", "sec-fetch-site": "same-origin"},
        {"origin": "https://studio.example.org", "x-forwarded-host": "studio.example.org"},
        {"origin": "https://app.example"},
    ],
)
def test_its_own_pages_and_programs_may(host, headers):
    http = client(host, origins=("https://app.example",))
    answer = http.post(PREFIX + "/patches/any/apply", headers=headers)
    assert answer.status_code == 404, answer.text
    assert http.post(PREFIX + "/patches/any/apply", json={"strength": 1}, headers=headers).status_code == 404


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", None])
def test_a_body_must_say_that_it_is_json(host, kind):
    http = client(host)
    headers = {} if kind is None else {"content-type": kind}
    for path in ("/forget", "/patches/any/rename", "/patches/any/apply"):
        assert http.post(PREFIX + path, content=b"{}", headers=headers).status_code == 415


def test_nothing_of_a_body_is_read_before_the_password(host):
    """A heavy body of somebody who may not send any costs nothing."""
    http = client(host, "ann:secret")
    read = []

    def parts():
        for _ in range(1000):
            read.append(1)
            yield b"[]," * 10_000

    began = time.process_time()
    answer = http.post(PREFIX + "/forget", content=parts(), headers=JSON)
    assert answer.status_code == 401 and time.process_time() - began < 5
    for method, path in routes(http, auth=("ann", "secret")):
        assert http.request(method, path, content=b"{", headers=JSON).status_code == 401, path


@pytest.mark.parametrize(
    "text", ["[" + "[]," * 5_000_000 + "[]]", "[" * 1_000_000, '{"a":' * 1_000_000, "9" * 1_000_000]
)
def test_a_body_that_costs_much_to_parse_is_not_parsed(host, text):
    http = client(host)
    tracemalloc.start()
    answer = http.post(PREFIX + "/forget", content=text.encode(), headers=JSON)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answer.status_code in (400, 422) and most < 200e6


HALF = "\ud800"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/forget", {"concepts": [{"name": HALF}]}),
        ("/forget", {"concepts": [{"name": "star"}], "name": HALF}),
        ("/forget", {"concepts": [{"name": "star"}], "method": HALF}),
        ("/forget", {"concepts": [{"name": "star"}], "theme": HALF}),
        ("/forget", {"concepts": [{"name": "star", "images": [HALF]}]}),
        ("/forget", {HALF: 1}),
        ("/evaluate", {"patch": HALF}),
        ("/evaluate", {"patch": "x", "clip_judge": HALF}),
        ("/patches/any/rename", {"name": HALF}),
        ("/patches/combine", {"name": HALF, "parts": [{"name": HALF}, {"name": "b"}]}),
    ],
)
def test_half_of_a_character_poisons_no_list(host, path, body):
    http = client(host)
    answer = http.post(PREFIX + path, content=json.dumps(body).encode(), headers=JSON)
    assert answer.status_code in (400, 422), answer.text
    for listing in ("/jobs", "/patches", "/active", "/dropped", "/reports", "/unreadable"):
        assert http.get(PREFIX + listing).json() == []


# -- passwords ------------------------------------------------------------------------------------------------------


def basic(text: bytes) -> str:
    return "Basic " + base64.b64encode(text).decode()


def test_every_spelling_of_a_password_matches_itself_alone():
    known = Credentials("ann:secret, bob:a:b, zoë:größe")
    for text in (b"ann:secret", b"bob:a:b", "zoë:größe".encode(), "zoë:größe".encode("latin-1")):
        assert known.fit(basic(text)) and known.fit(basic(text).replace("Basic", "basic"))
    for text in (b"", b"ann", b"ann:", b"ann:secre", b"ann:secrets", b":secret", b"bob:a", b"\xff:\xff", b"ann:a:b"):
        assert not known.fit(basic(text))
    for header in (
        "",
        "Basic",
        "Basic !!!",
        "Bearer " + basic(b"ann:secret")[6:],
        "Basic ann:secret",
        basic(b"ann:secret")[6:],
    ):
        assert not known.fit(header)


@pytest.mark.parametrize("auth", ["", "ann", "ann:", "ann:secret,bob:", ":secret", "ann:secret,"])
def test_no_password_may_be_missing(auth):
    with pytest.raises(RequestError, match="--api-auth") as caught:
        Credentials(auth)
    assert "secret" not in str(caught.value)


def test_the_rules_by_themselves():
    assert foreign_origin(OWN) is None and foreign_host(OWN) is None
    assert foreign_origin({**OWN, "origin": "http://127.0.0.1:7860"}) is None
    assert "evil.example" in foreign_origin({**OWN, "origin": "http://evil.example"})
    assert foreign_origin({**OWN, "origin": "http://evil.example"}, {"*"}) is None
    assert foreign_origin({**OWN, "origin": "http://evil.example"}, {"evil.example"}) is None
    assert "evil.example" in foreign_host({"host": "evil.example"})
    for host in ("", "[", "[::1", "a.b:x", "127.0.0.1.evil.example", "2130706433.example"):
        foreign_host({"host": host})
    assert foreign_host({"host": "127.0.0.1.evil.example"}) is not None
