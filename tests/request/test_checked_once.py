"""A request is checked once on its way from every front end to the patch: at its plan."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakenodes import loaded_nodes
from fakewebui import FakeWebui
from tiny import tiny_model

from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.request import settings
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.service.forget_job import ForgetJob
from forget_concept.core.service.forms import presets, settings_of
from forget_concept.core.service.page_form import Form, Line
from forget_concept.core.service.patch_store import PatchStore

STAR = ForgetRequest((Concept("star", "object", "circle"),), preserve=("moon", "heart"), settings={"ridge": 2.0})


class Checks:
    """How often a request was checked and settings were resolved."""

    requests = resolved = 0

    def once(self) -> bool:
        return (self.requests, self.resolved) == (1, 1)


@pytest.fixture()
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    found = Checks()
    check, resolve = ForgetRequest.check, settings.resolve_settings

    def counted_check(self: ForgetRequest) -> None:
        found.requests += 1
        check(self)

    def counted_resolve(*given: Any) -> Any:
        found.resolved += 1
        return resolve(*given)

    monkeypatch.setattr(ForgetRequest, "check", counted_check)
    for name, module in list(sys.modules.items()):
        if name.startswith("forget_concept.") and getattr(module, "resolve_settings", None) is resolve:
            monkeypatch.setattr(module, "resolve_settings", counted_resolve)
    return found


def test_on_the_command_line(run, tiny, checks: Checks) -> None:
    assert (
        run("forget", "--concept", "star", "--replacement", "circle", "--set", "ridge=2", "--out", "a.safetensors") == 0
    )
    assert checks.once()


def test_of_a_request_file(run, tiny, checks: Checks) -> None:
    Path("r.json").write_text(STAR.to_json(), encoding="utf-8")
    assert run("forget", "--request", "r.json", "--out", "a.safetensors") == 0
    assert checks.once()


def test_of_a_request_in_a_sequence(run, tiny, checks: Checks) -> None:
    few = ("--method", "forget_me_not", "--set", "steps=1", "--set", "n_images=1", "--set", "sample_steps=1")
    assert run("forget", "--concept", "star", "--out", "a.safetensors") == 0
    assert checks.once()
    assert run("forget", "--concept", "moon", *few, "--onto", "a.safetensors", "--out", "b.safetensors") == 0
    assert (checks.requests, checks.resolved) == (2, 2)
    # a closed form is solved for a joint request, which is a request of its own
    assert run("forget", "--concept", "key", "--onto", "b.safetensors", "--out", "c.safetensors") == 0
    assert (checks.requests, checks.resolved) == (4, 4)


# -- the webui ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_model()


def finished(store: PatchStore, job_id: str) -> None:
    end = time.monotonic() + 60
    while not store.jobs.get(job_id).over:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert store.jobs.get(job_id).state == "done", store.jobs.get(job_id).error


def test_from_the_webui_page(model: LatentDiffusion, tmp_path: Path, checks: Checks) -> None:
    from forget_concept.core.methods.registry import get

    store = PatchStore(FakeWebui(model, tmp_path))
    fields = presets(get("uce"))["tuned"] | {"ridge": 2.0}
    form = Form((Line("star", "circle"),), "moon, heart", "uce", "tuned", fields, 1.0, "0")
    finished(store, store.forget(ForgetJob(form.plan(), pairs=0)).id)
    assert checks.once()


def test_from_the_webui_over_rest(model: LatentDiffusion, tmp_path: Path, checks: Checks) -> None:
    pytest.importorskip("fastapi", reason="the routes need fastapi, which a webui brings: pip install fastapi httpx")
    pytest.importorskip("httpx", reason="calling the routes needs httpx: pip install httpx")
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from forget_concept.core.service.patch_store import patch_store_of
    from forget_concept.sd_webui_ext.api import PREFIX, mount

    host, app = FakeWebui(model, tmp_path), FastAPI()
    mount(app, host, None)
    answer = TestClient(app).post(PREFIX + "/forget", json=json.loads(STAR.to_json()) | {"pictures": 0})
    assert answer.status_code == 202, answer.text
    finished(patch_store_of(host), answer.json()["id"])
    assert checks.once()


# -- ComfyUI's nodes, with a stand-in for the host ------------------------------------------------------------------


@pytest.fixture()
def nodes(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    yield from loaded_nodes(model, monkeypatch)


BOXES = {
    "concept": "star -> circle",
    "kind": "object",
    "replacement": "",
    "preserve": "moon, heart",
    "method": "uce",
    "preset": "tuned",
    "strength": 1.0,
    "seed": 0,
}


def test_in_a_node(nodes: SimpleNamespace, checks: Checks) -> None:
    _, lora, _ = nodes.forget_concept.ForgetConcept.execute(None, None, **BOXES, settings='{"ridge": 2}')
    assert lora and checks.once()


def test_in_a_node_with_a_settings_node(nodes: SimpleNamespace, checks: Checks) -> None:
    from forget_concept.core.methods.registry import get

    chosen = settings_of(get("uce"), "tuned", presets(get("uce"))["tuned"] | {"ridge": 2.0})
    _, lora, _ = nodes.forget_concept.ForgetConcept.execute(None, None, **BOXES, method_settings=chosen)
    assert lora.metadata and checks.once()


def test_in_a_node_of_a_sequence(nodes: SimpleNamespace, checks: Checks) -> None:
    few = {"method": "forget_me_not", "settings": '{"steps": 1, "n_images": 1, "sample_steps": 1}'}
    execute = nodes.forget_in_sequence.ForgetInSequence.execute
    _, first, _ = execute(None, None, **BOXES | few)
    assert checks.once()
    execute(None, None, earlier=first, **BOXES | few | {"concept": "key"})
    assert (checks.requests, checks.resolved) == (2, 2)


def test_in_a_node_that_reads_json(nodes: SimpleNamespace, checks: Checks) -> None:
    _, lora, _ = nodes.forget_by_request.ForgetByRequest.execute(None, None, request=STAR.to_json())
    assert lora and checks.once()
