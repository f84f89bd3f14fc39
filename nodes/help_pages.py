"""The settings nodes' pages of help, made of the methods' settings; ``python -m forget_concept.nodes.help_pages``
writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.methods.base import Method
from ..core.methods.registry import all_methods
from ..core.service.forms import form_fields, presets
from .fields import node_id

__all__ = ["page", "place", "write"]


def place(method: type[Method]) -> Path:
    """Where the page is."""
    return Path(__file__).resolve().parent.parent / "web" / "docs" / f"{node_id(method)}.md"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return " / ".join(f"`{line}`" for line in str(value).split("\n") if line) if isinstance(value, str) else str(value)


def page(method: type[Method]) -> str:
    """The page of a method's settings node: every field, and what each preset has in it."""
    values = presets(method)
    lines = [
        f"# Settings: {method.title}",
        "",
        f"The settings of one method ([paper]({method.paper})). Connect the output to **method_settings** of "
        "*Forget Concept* or *Forget in Sequence*: it then says the method, the preset and the settings there.",
        "",
        "**preset** fills in the fields as you choose it. The fields are what counts; under the node it says what "
        "differs from the preset. Fields that are seldom needed are behind *Show Advanced* in the node's menu.",
        "",
        f"| Field | | {' | '.join(values)} |",
        f"|---|---|{'---|' * len(values)}",
    ]
    for widget in form_fields(method):
        words = widget.about.words if widget.thing is None else f"{widget.thing}: {widget.about.words}"
        cells = " | ".join(_cell(values[name][widget.name]) for name in values)
        lines.append(f"| **{widget.name}** | {words} | {cells} |")
    return "\n".join(lines) + "\n"


def write() -> None:
    """Write every page."""
    for method in all_methods().values():
        place(method).write_text(page(method), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write()
