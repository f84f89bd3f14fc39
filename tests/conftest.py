"""Shared fixtures. Helpers live in ``tests/tiny.py``, importable because this folder is on the path while testing."""

from __future__ import annotations

import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# the same examples in every run: a failure is one of the change at hand, not of the day's luck
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")

pytest_plugins = ["console"]

DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param(
        "cuda",
        id="cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine; those it has not are skipped in words."""
    return request.param


@pytest.fixture()
def model():
    """A fresh tiny diffusion model with 11 cross-attention sites."""
    from tiny import tiny_model

    return tiny_model()
