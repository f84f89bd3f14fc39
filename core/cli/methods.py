"""``forget-concept methods``: the methods, their presets and their settings."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from .console import Console

HELP = "list the methods with their presets and settings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from ..methods.registry import all_methods

    found = []
    method: Any
    for method in all_methods().values():
        presets = {name: dataclasses.asdict(settings) for name, settings in method.presets.items()}
        found.append({"id": method.id, "title": method.title, "paper": method.paper, "presets": presets})
        console.say(f"{method.id}: {method.title}")
        console.say(f"  {method.paper}")
        names = list(presets)
        rows = [[field, *(_shown(presets[name][field]) for name in names)] for field in presets[names[0]]]
        console.table(["setting", *names], rows)
    return {"schema": 1, "methods": found}


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return str(value).lower() if isinstance(value, bool) else str(value) or "-"
