"""One running ComfyUI for each host found; skipped in words where there is none, failed where one is required."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from comfyhost import REQUIRED, ComfyUI, found_hosts, missing

HOSTS: list[Path | None] = [*found_hosts()] or [None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.comfyui)


@pytest.fixture(scope="session", params=HOSTS, ids=lambda host: host.name if host else "no-host")
def comfyui(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    """A started host; its folder, with everything it writes, is temporary."""
    host = request.param
    if why := missing(host):
        if REQUIRED:
            pytest.fail(why + " (FORGET_CONCEPT_REQUIRE_HOSTS=1 asks for one)")
        pytest.skip(why)
    running = ComfyUI(host, tmp_path_factory.mktemp(f"comfyui-{host.name}"))
    try:
        running.start()
        yield running
    finally:
        running.stop()
