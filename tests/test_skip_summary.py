"""One line before pytest's own summary counts skipped tests by reason, under xdist too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "xdist"])
def test_skipped_tests_are_counted_by_reason_in_one_line(tmp_path, workers):
    source = (Path(__file__).parent / "conftest.py").read_text(encoding="utf-8")
    parts = [source[source.index(start) : source.index(end)] for start, end in (("def skip_summary", "DEVICES = ["),)]
    head = "from __future__ import annotations\nfrom collections import Counter\nimport pytest\n"
    (tmp_path / "conftest.py").write_text(head + parts[0], encoding="utf-8")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(3))\n"
        "@pytest.mark.skipif(True, reason='there is no CUDA device on this machine')\n"
        "def test_a(i): ...\n"
        "def test_b(): pytest.skip('no ComfyUI here: name one in COMFYUI_DIRS')\n"
        "def test_c(): ...\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *workers]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    line, closing = done.stdout.strip().splitlines()[-2:]
    assert line == ("4 skipped: 3 there is no CUDA device on this machine, 1 no ComfyUI here: name one in COMFYUI_DIRS")
    assert closing.startswith("1 passed, 4 skipped")
