"""Commands in processes of their own: nothing that libraries tell their developers is on standard error, and a console
of a narrow encoding loses no work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# progress of long work, in words and with its time
OWN = re.compile(r"[^:]+: \d+\.\d s")
NAME = "\u661f"  # not in cp1252


def run(folder: Path, *args: str) -> bytes:
    """Standard output of a command that ends well; its standard error holds progress alone."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS" and not k.endswith("_VERBOSITY")}
    done = subprocess.run(
        [sys.executable, "-m", "forget_concept.core.cli", *args],
        cwd=folder,
        env=environment | {"PYTHONIOENCODING": "cp1252"},
        capture_output=True,
    )
    told = done.stderr.decode("cp1252")
    assert done.returncode == 0, told
    assert [line for line in told.splitlines() if not OWN.fullmatch(line)] == []
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def forgotten(folder):
    return run(folder, "forget", "--concept", NAME, "--model", "mini", "--method", "uce", "--out", "p.safetensors")


def test_forgetting_in_a_narrow_encoding_saves_the_file_and_says_so(folder, forgotten):
    assert b"Forgot '?'" in forgotten and (folder / "p.safetensors").is_file()


def test_json_is_utf_8_in_a_narrow_encoding(folder, forgotten):
    told = json.loads(run(folder, "inspect", "p.safetensors", "--json").decode("utf-8"))
    assert NAME in json.dumps(told, ensure_ascii=False)


def test_drawing_says_nothing_else(folder):
    run(folder, "generate", "--prompt", "a star", "--model", "mini", "--steps", "1", "--out", "star.png")
    assert (folder / "star.png").is_file()


def test_listing_methods_says_nothing_else(folder):
    assert b"uce" in run(folder, "methods")
