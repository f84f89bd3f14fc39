"""Mutated files of every kind are refused in the project's own words, quickly, and never pass where they must not."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import KINDS, findings

COUNTS = {
    "patch": 600,
    "request": 1500,
    "bench": 600,
    "picture": 200,
    "map": 400,
    "work": 400,
    "results": 600,
    "results table": 300,
    "fisher": 200,
    "attack": 300,
    "infotext": 600,
    "form": 600,
    "prompts": 300,
    "theme": 300,
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_untrusted_file_is_read_wrongly(kind, tmp_path):
    found = [f"{number}: {problem}" for number, _, problem in findings(kind, COUNTS[kind], folder=tmp_path)]
    assert not found, "\n".join(found[:5])


@pytest.mark.long
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_nor_is_any_of_many(kind, tmp_path):
    found = [f"{number}: {problem}" for number, _, problem in findings(kind, 50 * COUNTS[kind], 1, tmp_path)]
    assert not found, "\n".join(found[:5])


SCRIPT = """
import resource, sys
sys.path.insert(0, {tests!r})
import fuzz
make, read, name = fuzz.KINDS["theme"]
def greedy(path):
    if {greedy} and resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        bytearray(900 * 2**20)
    read(path)
fuzz.KINDS["theme"] = (make, greedy, name)
sys.argv = ["fuzz", "theme", "--count", "5", "--memory", str(500 * 2**20)]
sys.exit(fuzz.main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the bound of the memory is Linux's")
@pytest.mark.parametrize("reader", ["modest", "greedy"])
def test_a_read_that_takes_500_mb_is_a_finding(reader):
    """The bound is that of ``--memory``, in a process of its own."""
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), greedy=reader == "greedy")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, "MemoryError" in done.stdout) == ((1, True) if reader == "greedy" else (0, False))


def test_a_finding_is_one(tmp_path, monkeypatch):
    """The fuzzer sees an exception that is no sentence, and a file that passes where it must not."""
    make, _, name = KINDS["patch"]

    def crash(path):
        raise KeyError("x")

    monkeypatch.setitem(KINDS, "patch", (make, crash, name))
    assert len(list(findings("patch", 5, folder=tmp_path))) == 5
    monkeypatch.setitem(KINDS, "patch", (make, lambda path: None, name))
    must = sum(make(random.Random(f"patch 0 {number}")).refuse for number in range(100))
    assert 10 < must == len(list(findings("patch", 100, folder=tmp_path)))
