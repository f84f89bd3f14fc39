"""Lets the tests run in a clone of any name; conftest loads this."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Take the root for a plain folder.

    pytest would import its ``__init__.py`` before the tests, which fails in a folder whose name is no Python name:
    forget-concept, as a clone is called.
    """
    return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None
