"""``forget-concept methods``: list the methods with their presets and settings."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from .console import Console

if TYPE_CHECKING:
    from ..methods.base import Method

HELP = "list the methods with their presets and settings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "method", nargs="?", metavar="METHOD", help="explain every setting of this method (default: list all methods)"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from ..methods.registry import all_methods, get
    from ..service.forms import settings_json

    chosen = list(all_methods().values()) if args.method is None else [get(args.method)]
    found = []
    for method in chosen:
        presets = {name: dataclasses.asdict(settings) for name, settings in method.presets.items()}
        found.append(
            {
                "id": method.id,
                "title": method.title,
                "paper": method.paper,
                "presets": presets,
                "settings": settings_json(method),
            }
        )
        console.say(f"{method.id}: {method.title}")
        console.say(f"  {method.paper}")
        if args.method is None:
            rows = [[name, *(_shown(values[name]) for values in presets.values())] for name in _names(method)]
            console.table(["setting", *presets], rows)
        else:
            _explain(method, presets, console)
    if args.method is None:
        console.say("'forget-concept methods METHOD' explains every setting of a method.")
    return {"schema": 1, "methods": found}


def _names(method: type[Method]) -> list[str]:
    return [field.name for field in dataclasses.fields(method.Settings)]


def _explain(method: type[Method], presets: dict[str, dict[str, Any]], console: Console) -> None:
    """Print every setting by group: what it does, which values it accepts, and its value in each preset."""
    from ..request.settings import describe_settings

    infos = describe_settings(method.Settings)
    groups = dict.fromkeys(info.group for info in infos)
    # the method's own first, as in forms
    for group in sorted(groups, key=lambda group: group != "method"):
        console.say()
        console.say(f"{method.title if group == 'method' else group.capitalize()}:")
        for info in infos:
            if info.group == group:
                values = ", ".join(f"{name} {_shown(preset[info.name])}" for name, preset in presets.items())
                console.say(f"  --set {info.name}=...  {info.values()}")
                console.say(f"      {info.help}")
                console.say(f"      {values}{'; seldom needed' if info.advanced else ''}")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return str(value).lower() if isinstance(value, bool) else str(value) or "-"
