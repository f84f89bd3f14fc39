"""``forget-concept themes``: list the themes, and print the list of one."""

from __future__ import annotations

import argparse
from typing import Any

from .console import Console

HELP = "list the themes, and print the list of one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "theme", nargs="?", metavar="THEME", help="print the file of this theme, to copy and edit (default: list all)"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from ..request.themes import load_theme, themes, user_theme_folder

    folder = user_theme_folder()
    found = [load_theme(name) for name in (themes() if args.theme is None else [args.theme])]
    if args.theme is not None:
        console.say(found[0].path.read_text(encoding="utf-8-sig").rstrip("\n"))
    else:
        for theme in found:
            own = " (yours)" if theme.path.parent == folder else ""
            console.say(f"{theme.name}{own}: {', '.join(concept.name for concept in theme.concepts)}")
        console.say(
            f"Your own lists are files NAME.txt in {folder}; 'forget-concept themes NAME' prints one to begin with."
        )
    return {
        "schema": 1,
        "folder": str(folder),
        "themes": [
            {"name": theme.name, "file": str(theme.path), "concepts": [concept.name for concept in theme.concepts]}
            for theme in found
        ],
    }
