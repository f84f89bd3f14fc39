"""The rooms of the package: imports go down only, and each room stays small enough to take in at a glance."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("core", "nodes", "sd_webui_ext")
# from the ground up: a room may import from rooms before it, never from one behind it
ROOMS = (
    "core",  # errors.py, progress.py, version.py
    "core/files",
    "core/request",
    "core/prompts",
    "core/models",
    "core/patch",
    "core/formats",
    "core/training",
    "core/methods",
    "core/mini",
    "core/mini/train",
    "core/evaluation",
    "core/api.py",
    "core/eval_unlearn.py",
    "core/service",
    "core/cli",
    "nodes",
    "sd_webui_ext",
)
FRONTS = ("nodes", "sd_webui_ext")
MAP = ROOT / "docs" / "architecture.md"


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def room_of(path: Path) -> str:
    """The longest entry of :data:`ROOMS` that the file lies in."""
    name = path.relative_to(ROOT).as_posix()
    return max((room for room in ROOMS if name == room or name.startswith(room + "/")), key=len)


@cache
def imported_files(path: Path) -> frozenset[Path]:
    """Every file of the package that this one imports, also inside functions and for type checking."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for alias in node.names:
            targets = (folder / f"{alias.name}.py", folder / alias.name / "__init__.py", folder / "__init__.py")
            target = next((t for t in (*targets, folder.with_suffix(".py")) if t.is_file()), None)
            assert target is not None, f"{path} imports {alias.name} from {folder}: not there"
            found.add(target)
    return frozenset(found)


def test_imports_between_rooms_go_down_only():
    wrong = []
    for path in sources():
        here = room_of(path)
        for target in imported_files(path):
            there = room_of(target)
            up = ROOMS.index(there) > ROOMS.index(here)
            if up or (there != here and there in FRONTS):
                wrong.append(f"{path.relative_to(ROOT)} ({here}) imports {target.relative_to(ROOT)} ({there})")
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_through_others():
    graph = {path: {t for t in imported_files(path) if t.name != "__init__.py"} for path in sources()}
    done: set[Path] = set()

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        assert path not in trail, " -> ".join(p.relative_to(ROOT).as_posix() for p in (*trail, path))
        if path in done:
            return
        for target in sorted(graph.get(path, ())):
            visit(target, (*trail, path))
        done.add(path)

    for path in graph:
        visit(path, ())


def test_only_host_files_name_a_host():
    names = re.compile(
        r"^\s*(?:import|from) +(comfy|comfy_extras|comfy_execution|folder_paths|server|modules|backend)\b",
        re.MULTILINE,
    )
    allowed = re.compile(r"^nodes/host/\w+\.py$|^sd_webui_ext/(host\w*|webui)\.py$")
    named = [p.relative_to(ROOT).as_posix() for p in sources() if names.search(p.read_text(encoding="utf-8"))]
    assert not [name for name in named if not allowed.match(name)]
    assert named, "the expression finds the host files at least"


def test_core_names_no_web_framework():
    names = re.compile(r"^\s*(?:import|from) +(gradio|fastapi|pydantic|aiohttp|starlette)\b", re.MULTILINE)
    core = [path for path in sources() if path.is_relative_to(ROOT / "core")]
    assert not [p.relative_to(ROOT) for p in core if names.search(p.read_text(encoding="utf-8"))]


def test_the_map_counts_the_files_of_every_room():
    """``docs/architecture.md`` lists the rooms with the number of their files."""
    text = MAP.read_text(encoding="utf-8")
    listed = {room: int(count) for room, count in re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", text, re.MULTILINE)}
    actual = Counter(room_of(path) for path in sources() if path.read_text(encoding="utf-8").strip())
    assert listed == {room: actual[room] for room in ROOMS if actual[room]}
