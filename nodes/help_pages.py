"""The settings nodes' help pages, from the metadata of the settings' fields; :mod:`.generate` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.methods.base import Method
from ..core.service.forms import FormField, form_fields, presets
from .fields import node_id

__all__ = ["page", "place"]


def place(method: type[Method]) -> Path:
    """Path of the page."""
    return Path(__file__).resolve().parent.parent / "web" / "docs" / f"{node_id(method)}.md"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return " / ".join(f"`{line}`" for line in str(value).split("\n") if line) if isinstance(value, str) else str(value)


def _allowed(field: FormField) -> str:
    """The accepted values, as text."""
    if field.info.numeric:
        return f"{field.info.low:g} to {field.info.high:g}"
    if field.kind == "choice":
        return ", ".join(f"`{option}`" for option in field.options)
    return {"switch": "on, off", "line": "text", "lines": "lines of text"}[field.kind]


def page(method: type[Method]) -> str:
    """The page of a method's settings node: every field with its help, its range and its value in each preset."""
    values = presets(method)
    lines = [
        f"# Settings: {method.title}",
        "",
        f"The settings of one method ([paper]({method.paper})). Connect the output to **method_settings** of "
        "*Forget Concept* or *Forget in Sequence*. It replaces the method, the preset and the settings there.",
        "",
        "**preset** fills in the fields. Only the fields count; the node reports what differs from the preset. Fields "
        "that are seldom needed are behind *Show Advanced* in the node's menu.",
        "",
        f"| Field | What it does | Values | {' | '.join(values)} |",
        f"|---|---|---|{'---|' * len(values)}",
    ]
    for field in form_fields(method):
        cells = " | ".join(_cell(values[name][field.name]) for name in values)
        lines.append(f"| **{field.name}** | {field.help} | {_allowed(field)} | {cells} |")
    return "\n".join(lines) + "\n"
