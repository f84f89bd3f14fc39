"""Requests made from the served OpenAPI schema: never a 500, and every error is a sentence."""

from __future__ import annotations

import os

import hypothesis
import pytest
from fakewebui import FakeWebui

from forget_concept.core import mini
from forget_concept.core.service.patch_store import patch_store_of

EXAMPLES = int(os.environ.get("FORGET_CONCEPT_EXAMPLES", "40"))  # of each operation


@pytest.mark.long
def test_no_request_of_the_schema_is_answered_with_a_500(tmp_path):
    fastapi = pytest.importorskip("fastapi", reason="the routes need fastapi: pip install fastapi httpx")
    reason = "making requests from a schema needs schemathesis: pip install schemathesis"
    schemathesis = pytest.importorskip("schemathesis", reason=reason)
    from forget_concept.sd_webui_ext.api import PREFIX, mount

    app, host = fastapi.FastAPI(), FakeWebui(mini.load(), tmp_path)
    mount(app, host, None)
    jobs = patch_store_of(host).jobs
    schema = schemathesis.openapi.from_asgi(PREFIX + "/openapi.json", app)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:

        @hypothesis.settings(
            max_examples=EXAMPLES, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None
        )
        @hypothesis.given(case=operation.as_strategy())
        def ask(case):
            for job in jobs.all():  # one that a request before this one started
                jobs.cancel(job.id)
            answer = case.call(headers={"host": "127.0.0.1"})
            assert answer.status_code < 500, answer.text[:300]
            if answer.status_code >= 400:
                assert isinstance(answer.json()["detail"], str)

        ask()
