"""What is said of versions agrees: the package's lower bounds, the rows of the matrix, its results and their page."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matrix
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lower_bounds(project) -> dict[str, str]:
    extras = project["optional-dependencies"]
    items = [*project["dependencies"], *extras["torch"], *extras["mini"]]
    return dict(item.split(">=") for item in items)


def test_the_matrix_runs_the_oldest_and_the_newest(project):
    oldest, newest = matrix.ROWS["oldest"], matrix.ROWS["newest"]
    models = matrix.ROWS["oldest with models"]
    bounds = lower_bounds(project)
    # the oldest torch of all runs what works on weights alone
    assert oldest.tests == matrix.CORE and not models.tests
    for library, row in (("torch", oldest), ("transformers", models), ("diffusers", models)):
        (wanted,) = (package for package in row.packages if package.startswith(library))
        assert re.fullmatch(rf"{library}=={re.escape(bounds[library])}\.(\*|\d+)", wanted)
        assert library in newest.packages  # in whatever version is the newest
    pythons = {name.rpartition(" ")[2] for name in project["classifiers"] if "Python :: 3." in name}
    assert {oldest.python, newest.python} == {min(pythons, key=_key), max(pythons, key=_key)}
    assert project["requires-python"] == f">={oldest.python}"


def _key(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_the_page_states_the_packages_lower_bounds(project):
    stated = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \| no upper bound \|$", PAGE, re.MULTILINE))
    bounds = lower_bounds(project)
    assert stated == {library: bounds[library] for library in matrix.LIBRARIES}


def test_the_pages_table_is_that_of_the_results():
    lines = matrix.read()
    assert {line["row"] for line in lines} <= set(matrix.ROWS)
    assert matrix.with_table(PAGE, lines) == PAGE
    for line in lines:
        assert line["python"].startswith(matrix.ROWS[line["row"]].python)


def test_a_broken_fixture_counts_as_a_failure(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="2" errors="1" skipped="3"/></testsuites>')
    assert matrix.counted(report) == {"passed": 3, "failed": 3, "skipped": 3}


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        matrix.main(["--rows", "ancient"])
    told = capsys.readouterr().err
    assert "there is no row 'ancient': choose from oldest, oldest with models, middle, newest" in told
