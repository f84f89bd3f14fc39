"""Generates locales and the settings nodes' help pages from the schemas of nodes and the metadata of settings.

The numbers of files in ``docs/architecture.md`` are counted here too, so that a new file needs no edit there.

``python -m forget_concept.nodes.generate`` (``make generated``) writes the files, and ``--check`` only lists those that
are out of date; neither needs a ComfyUI. Translations are in ``locales/<language>/texts.json``, by their English text.
A text without a translation is ``null`` there and stays English in the locale.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.methods.registry import all_methods
from . import help_pages
from .declared import DeclaredNode, declared_nodes

__all__ = ["ROOT", "escaped", "generated", "main", "missing_translations", "plain"]

ROOT = Path(__file__).resolve().parent.parent
Texts = dict[str, Any]
_ROOM = re.compile(r"^\| `([\w/.]+)` \| \d+ \|", re.MULTILINE)


def escaped(text: str) -> str:
    """Escape braces, ``@`` and ``|`` for a locale file, because the page compiles its texts as messages."""
    return re.sub(r"[{}@|]", lambda match: "{'" + match[0] + "'}", text)


def plain(text: str) -> str:
    """The text that the page shows for a locale's text.

    Raises:
        ValueError: If the text would not compile.
    """
    rest = re.sub(r"\{'[{}@|]'\}", "", text)
    if re.search(r"[{}@|]", rest):
        raise ValueError(text)
    return re.sub(r"\{'([{}@|])'\}", r"\1", text)


def _english(nodes: Mapping[str, DeclaredNode]) -> Texts:
    return {
        name: {
            "display_name": node.display_name,
            "description": node.description,
            "inputs": {socket.id: {"name": socket.id, "tooltip": socket.tooltip or ""} for socket in node.inputs},
            "outputs": {
                str(i): {"name": socket.display_name or socket.id, "tooltip": socket.tooltip or ""}
                for i, socket in enumerate(node.outputs)
            },
        }
        for name, node in nodes.items()
    }


def _places(texts: Texts) -> Iterator[tuple[str, Texts, str]]:
    """Every text: its path, and the mapping and key that hold it."""
    for name, node in texts.items():
        for key in ("display_name", "description"):
            yield f"{name}/{key}", node, key
        for part in ("inputs", "outputs"):
            for socket, entry in node[part].items():
                for key in ("name", "tooltip"):
                    yield f"{name}/{part}/{socket}/{key}", entry, key


def _translated(english: Texts, catalogue: Texts) -> Texts:
    found = json.loads(json.dumps(english))
    for place, entry, key in _places(found):
        text = entry[key]
        entry[key] = catalogue["in_place"].get(place) or catalogue["texts"].get(text) or text
    return found


def _merged(english: Texts, catalogue: Texts) -> Texts:
    """The catalogue with all current texts, in order; translations of texts that no longer exist move to ``unused``."""
    known = {**catalogue["unused"], **catalogue["texts"]}
    places = list(_places(english))
    texts = {entry[key]: known.get(entry[key]) for _, entry, key in places if entry[key]}
    here = {place for place, _, _ in places}
    in_place = {place: text for place, text in catalogue["in_place"].items() if place in here}
    unused = {text: translation for text, translation in known.items() if text not in texts and translation}
    return {"texts": texts, "in_place": in_place, "unused": unused}


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _locale(texts: Texts) -> str:
    made = json.loads(json.dumps(texts))
    for _, entry, key in _places(made):
        entry[key] = escaped(entry[key])
    return _json(made)


def _catalogues() -> dict[Path, Texts]:
    return {
        path: json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "locales").glob("*/texts.json"))
    }


def generated() -> dict[Path, str]:
    """The expected content of every generated file."""
    english = _english(declared_nodes())
    found = {ROOT / "locales" / "en" / "nodeDefs.json": _locale(english)}
    for path, catalogue in _catalogues().items():
        catalogue = _merged(english, catalogue)
        found[path] = _json(catalogue)
        found[path.with_name("nodeDefs.json")] = _locale(_translated(english, catalogue))
    if (path := ROOT / "docs" / "architecture.md").is_file():  # a wheel has no docs
        found[path] = _counted(path.read_text(encoding="utf-8"))
    return found | {help_pages.place(method): help_pages.page(method) for method in all_methods().values()}


def _counted(text: str) -> str:
    """The map of the rooms with the number of each room's files as it is; a file is its innermost room's."""
    rooms = [match[1] for match in _ROOM.finditer(text)]
    counts: Counter[str] = Counter()
    for package in ("core", "nodes", "sd_webui_ext"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if path.read_text(encoding="utf-8").strip():
                counts[max((r for r in rooms if name == r or name.startswith(f"{r}/")), key=len, default="")] += 1
    return _ROOM.sub(lambda match: f"| `{match[1]}` | {counts[match[1]]} |", text)


def missing_translations() -> dict[str, list[str]]:
    """The texts without a translation, by language."""
    english = _english(declared_nodes())
    return {
        path.parent.name: [text for text, known in _merged(english, catalogue)["texts"].items() if known is None]
        for path, catalogue in _catalogues().items()
    }


def _outdated(files: Mapping[Path, str]) -> list[Path]:
    return [path for path, text in files.items() if not path.is_file() or path.read_bytes() != text.encode()]


def main(argv: list[str] | None = None) -> int:
    """Write the files, or with ``--check`` list those that are out of date; returns 1 if there are any, else 0."""
    parser = argparse.ArgumentParser(description="Generate locales and help pages from nodes and settings.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    check = parser.parse_args(argv).check
    files = generated()
    outdated = _outdated(files)
    names = ", ".join(path.relative_to(ROOT).as_posix() for path in outdated)
    if check:
        if outdated:
            print(f"Out of date: {names}. Run 'make generated'.", file=sys.stderr)
        return 1 if outdated else 0
    for path in outdated:
        path.write_text(files[path], encoding="utf-8", newline="\n")
    print(f"Written: {names}." if outdated else "Every generated file is up to date.")
    for language, texts in missing_translations().items():
        if texts:
            print(f"Without a translation into '{language}' ({len(texts)}), null in locales/{language}/texts.json:")
            print("\n".join(f"  {text}" for text in texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
