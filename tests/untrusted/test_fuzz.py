"""Mutated files of every kind are refused in the project's own words, quickly, and never pass where they must not."""

from __future__ import annotations

import random

import pytest
from fuzz import KINDS, findings

COUNTS = {"patch": 600, "request": 1500, "bench": 600, "picture": 200, "map": 400, "work": 400, "results": 600}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_untrusted_file_is_read_wrongly(kind, tmp_path):
    found = [f"{number}: {problem}" for number, _, problem in findings(kind, COUNTS[kind], folder=tmp_path)]
    assert not found, "\n".join(found[:5])


@pytest.mark.long
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_nor_is_any_of_many(kind, tmp_path):
    found = [f"{number}: {problem}" for number, _, problem in findings(kind, 50 * COUNTS[kind], 1, tmp_path)]
    assert not found, "\n".join(found[:5])


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
