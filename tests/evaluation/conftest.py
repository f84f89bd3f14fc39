"""Fixtures of the evaluation's tests."""

from __future__ import annotations

import pytest

from forget_concept.core import mini


@pytest.fixture(scope="module")
def embedded():
    """The embedded model and its probe."""
    return mini.load(), mini.load_probe()
