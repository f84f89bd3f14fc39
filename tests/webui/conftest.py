"""One running webui or Forge for each host found; skipped in words where there is none, failed where required."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from webuihost import REQUIRED, WebUI, hosts, missing


def prepared(kind: str, host: Path | None, folder: Path) -> WebUI:
    """A host that is ready to start, or the reason why there is none."""
    if why := missing(host, kind):
        if REQUIRED:
            pytest.fail(why + " (FORGET_CONCEPT_REQUIRE_HOSTS=1 asks for one)")
        pytest.skip(why)
    assert host is not None
    found = WebUI(host, folder, kind)
    found.prepare()
    return found


@pytest.fixture(scope="session", params=hosts())
def webui(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """A started host; its folder, with everything it writes, is temporary."""
    kind, host = request.param
    running = prepared(kind, host, tmp_path_factory.mktemp(kind))
    running.second_checkpoint("turned")
    running.v_checkpoint("velocity")
    running.marked_checkpoint("marked")
    try:
        running.compile()
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(params=hosts())
def stopped(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[WebUI]:
    """A host of its own for one test, to be started as that test wants it."""
    kind, host = request.param
    running = prepared(kind, host, tmp_path)
    try:
        yield running
    finally:
        running.stop()
