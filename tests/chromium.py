"""A real Chromium for page tests, driven by Playwright (`pip install playwright`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hosting import REQUIRED

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
_QUIET += ["--disable-component-update", "--disable-sync"]


@contextmanager
def chromium() -> Iterator[Any]:
    """Launch a browser; without one the test is skipped with a reason, or fails if hosts are required."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        _skip_or_fail("there is no Chromium on this machine")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _skip_or_fail("Playwright is not installed (pip install playwright)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=_QUIET)
        try:
            yield started
        finally:
            started.close()


def _skip_or_fail(why: str) -> None:
    if REQUIRED:
        pytest.fail(why + " (FORGET_CONCEPT_REQUIRE_HOSTS=1 requires one)")
    pytest.skip(why)
