"""On standard error there is what a command says, and nothing that libraries tell their developers."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

# progress of long work, in words and with its time
OWN = re.compile(r"[^:]+: \d+\.\d s")
COMMANDS = {
    "methods": ["methods"],
    "generate": ["generate", "--prompt", "a star", "--model", "mini", "--steps", "1", "--out", "star.png"],
    "forget": ["forget", "--concept", "star", "--model", "mini", "--method", "uce", "--out", "p.safetensors"],
}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_no_foreign_text_is_on_standard_error(command, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS" and not k.endswith("_VERBOSITY")}
    done = subprocess.run(
        [sys.executable, "-m", "forget_concept.core.cli", *COMMANDS[command]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not OWN.fullmatch(line)] == []
