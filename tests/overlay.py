"""A copy of the package with one additional method file, for tests that import it in separate processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["ROOT", "THROWAWAY", "overlay", "python"]

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("__init__.py", "pyproject.toml", "core", "nodes", "sd_webui_ext", "locales", "web", "docs", "tests")
WEIGHTS = Path("core", "mini", "weights")

# it behaves like UCE, so that it passes the shared tests, but has its own settings
THROWAWAY = '''
"""A method that only tests know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..request.settings import setting
from .registry import register
from .uce import UCE, UCESettings


@dataclass(frozen=True)
class ThrowawaySettings(UCESettings):
    dial: float = setting(0.5, "How far the throwaway dial is turned.", minimum=0.25, maximum=2, step=0.05)
    rounds: int | None = setting(
        None, "Rounds of the throwaway; 0: none.", minimum=1, maximum=64, none_value=0, quick=2, group="odds"
    )
    flavour: Literal["sweet", "sour"] = setting("sweet", "Flavour of the throwaway.", advanced=True)
    corners: tuple[str, ...] = setting(("north",), "Corners of the throwaway.", choices=("north", "south"))


@register
class Throwaway(UCE):
    id = "throwaway"
    title = "Throwaway (of a test)"
    paper = "https://example.org/throwaway"
    Settings = ThrowawaySettings
    main = ("dial", "rounds", "corners")
    presets = {"published": ThrowawaySettings(), "tuned": ThrowawaySettings(dial=0.75, corners=("south",))}
'''


def overlay(folder: Path) -> Path:
    """Copy the package to ``folder/forget_concept`` with the throwaway method dropped in; returns its root."""
    root = folder / "forget_concept"
    root.mkdir(parents=True)
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "weights", "*.pyc")
            shutil.copytree(source, root / name, ignore=ignored)
        else:
            shutil.copy(source, root / name)
    (root / WEIGHTS).symlink_to(ROOT / WEIGHTS, target_is_directory=True)
    (root / "core" / "methods" / "throwaway.py").write_text(THROWAWAY.lstrip(), encoding="utf-8")
    return root


def python(root: Path, *args: str) -> str:
    """Run Python with the copy as the package; returns its standard output, and fails with the output on errors."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root.parent), str(root / "tests")])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *args], cwd=root, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, f"{args} exited with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
