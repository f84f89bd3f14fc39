"""The quick tests with old and with new libraries: `make matrix`, which writes `docs/versions.md`.

Every row of :data:`ROWS` becomes a virtual environment in `build/matrix/NAME`, with this repository installed as a
package; an environment that is there is used again. The results are kept in `benchmarks/versions.csv`, one line per row
and selection of tests, and the table of the page is made from them. `--rows oldest,newest` chooses rows, arguments
after `--` choose tests (`make matrix ARGS="--rows oldest -- tests/methods"`).

It needs nothing but Python itself, so that any interpreter starts it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "versions.csv"
PAGE = ROOT / "docs" / "versions.md"
# the libraries whose installed versions a line of the results names
LIBRARIES = ("torch", "numpy", "transformers", "diffusers", "peft")
COUNTS = ("passed", "failed", "skipped")
COLUMNS = ("row", "python", *LIBRARIES, "tests", *COUNTS, "seconds")
WHOLE = "all quick tests"


@dataclass(frozen=True)
class Row:
    """An environment: the minor version of Python, what pip is asked for beside the package's own extras, and the tests
    that run in it where no others are chosen (none: all); ``older`` packages replace those that the extras brought,
    whatever the extras ask for."""

    python: str
    packages: tuple[str, ...]
    tests: tuple[str, ...] = ()
    older: tuple[str, ...] = ()


# what works on weights alone, whoever loaded them
CORE = tuple(f"tests/{room}" for room in ("files", "request", "prompts", "patch", "formats", "training"))
OLDER = (
    "transformers==4.49.*",
    "tokenizers==0.21.*",
    "huggingface-hub==0.30.*",
    "diffusers==0.32.*",
    "accelerate==1.3.*",
    "peft==0.14.*",
)
ROWS = {
    # transformers 4.57 cannot be imported beside it; the newest ones that can build the tests' models
    "oldest": Row("3.10", ("torch==2.1.2", "numpy<2"), CORE, OLDER),
    "oldest with models": Row("3.10", ("torch==2.2.*", "numpy<2", "transformers==4.57.*", "diffusers==0.35.*")),
    "middle": Row("3.11", ("torch==2.13.*", "transformers==4.57.*", "diffusers==0.36.*")),
    "newest": Row("3.13", ("torch", "numpy", "transformers", "diffusers", "peft", "tokenizers", "huggingface-hub")),
}


def interpreter(version: str, given: Sequence[str]) -> str:
    """The path of a Python of this minor version: one of those given, or of those on the PATH and in pyenv's folder."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [*given, f"python{version}", "python3", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for name in found:
        path = shutil.which(name)
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        if path and subprocess.run([path, "-c", code], capture_output=True, text=True).stdout.strip() == version:
            return path
    sys.exit(f"There is no Python {version}: install it, or name it with --python PATH.")


def build(folder: Path, row: Row, given: Sequence[str], pip_args: Sequence[str]) -> Path:
    """Make the environment, unless it is there with just these packages, and return its interpreter."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "packages.json"
    wanted = [row.python, *row.packages, *row.older]
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return python
    subprocess.run([interpreter(row.python, given), "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *pip_args]
    subprocess.run([*pip, *row.packages, "-e", f"{ROOT}[cli,dev]"], check=True)
    # as in the Makefile: the original LDM UNet, whose own requirements are years old
    subprocess.run([*pip, "--no-deps", "stable-diffusion-sdkit==2.1.5"], check=True)
    if row.older:
        subprocess.run([*pip, "--no-deps", *row.older], check=True)
    stamp.write_text(json.dumps(wanted), encoding="utf-8")
    return python


def installed(python: Path) -> dict[str, str]:
    """The versions that the environment really has."""
    code = (
        "import json, platform, importlib.metadata as m; print(json.dumps({'python': platform.python_version(), "
        f"**{{n: m.version(n).partition('+')[0] for n in {LIBRARIES!r}}}}}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def counted(report: Path) -> dict[str, int]:
    """Count the tests of a JUnit report; an error in a fixture or at collection counts as a failure."""
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    total, failed, errors, skipped = (int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped"))
    return {"passed": total - failed - errors - skipped, "failed": failed + errors, "skipped": skipped}


def tested(folder: Path, python: Path, workers: int, arguments: Sequence[str]) -> dict[str, str]:
    """Run the tests in an environment and return the columns of its line."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "-m", "not long", "--tb=short", f"--junitxml={report}"]
    command += ["-n", str(workers)] if workers > 1 else []
    begun = time.monotonic()
    subprocess.run([*command, *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if not report.is_file():
        sys.exit(f"pytest ended without a report in {folder}: see its output above.")
    seconds = round(time.monotonic() - begun)
    counts = {name: str(number) for name, number in counted(report).items()}
    return {**installed(python), "tests": " ".join(arguments) or WHOLE, **counts, "seconds": str(seconds)}


def read() -> list[dict[str, str]]:
    """The lines of the results, as they are kept."""
    if not RESULTS.is_file():
        return []
    with RESULTS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(lines: Sequence[dict[str, str]]) -> None:
    """Keep the lines, in the order of :data:`ROWS`, and make the page's table of them."""
    ordered = sorted(lines, key=lambda line: (list(ROWS).index(line["row"]), line["tests"] != WHOLE, line["tests"]))
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), ordered), encoding="utf-8")


def with_table(page: str, lines: Sequence[dict[str, str]]) -> str:
    """The page with the lines in place of its table."""
    titles = ["Python", *LIBRARIES, "tests", *COUNTS, "seconds"]
    cells = [[line[name] for name in COLUMNS[1:]] for line in lines]
    for line in cells:
        line[COLUMNS.index("tests") - 1] = line[COLUMNS.index("tests") - 1].replace("tests/", "")
    rows = [titles, ["---"] * len(titles), *cells]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return re.sub(r"^\| Python \|.*\n(?:\|.*\n)*", lambda _: table, page, count=1, flags=re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="rows, separated by commas (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "matrix", help="folder of the environments")
    parser.add_argument("--python", action="append", default=[], help="an interpreter to choose from; may be repeated")
    parser.add_argument("--pip-args", default="", help="passed to pip, such as an index with torch for the CPU alone")
    parser.add_argument("--workers", type=int, default=2, help="processes of a row's tests")
    parser.add_argument("tests", nargs="*", help="passed to pytest, after '--'")
    args = parser.parse_args(arguments)
    chosen = args.rows.split(",")
    if unknown := sorted(set(chosen) - set(ROWS)):
        parser.error(f"there is no row '{unknown[0]}': choose from {', '.join(ROWS)}")
    failed = 0
    for name in chosen:
        folder = args.work / name.replace(" ", "-")
        python = build(folder, ROWS[name], args.python, args.pip_args.split())
        line = {"row": name, **tested(folder, python, args.workers, args.tests or ROWS[name].tests)}
        kept = [other for other in read() if (other["row"], other["tests"]) != (name, line["tests"])]
        write([*kept, line])
        print(f"{name}: " + ", ".join(f"{line[count]} {count}" for count in COUNTS), f"in {line['seconds']} s")
        failed += int(line["failed"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
