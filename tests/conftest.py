"""Shared fixtures. Helpers are in ``tests/*.py``, importable because this folder is on ``sys.path`` during tests."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# the same examples in every run: a failure is due to the change at hand, not to chance
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")

pytest_plugins = ["collecting", "console"]

HOST_FOLDERS = ("comfyui", "webui")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run all tests of a file in one process, and all tests of a host too, so that it is started once."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder = nodeid.removeprefix("tests/").partition("/")[0]
            return folder if folder in HOST_FOLDERS else super()._split_scope(nodeid)

    return Scheduling(config, log)


def skip_summary(reasons: Sequence[str]) -> str:
    """One line that says how many tests were skipped and why, the most frequent reason first."""
    counts = Counter(reason.removeprefix("Skipped: ").strip().rstrip(".") for reason in reasons)
    return f"{len(reasons)} skipped: " + ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for r in terminalreporter.stats.get("skipped", []) if isinstance(r.longrepr, tuple)]
    if reports:
        terminalreporter.write_line(skip_summary([report.longrepr[2] for report in reports]))


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
    """Every device; those that this machine lacks are skipped with a reason."""
    return request.param


@pytest.fixture()
def model():
    """A fresh tiny diffusion model with 11 cross-attention sites."""
    from tiny import tiny_model

    return tiny_model()
