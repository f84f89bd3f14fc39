"""Write the report as a self-contained ``report.html`` and a ``report.json``."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import ForgetConceptError
from ...files.writing import check_folder, check_writable, make_folder, write_bytes, write_json
from ...version import VERSION
from ..attention_pictures import heat
from ..retention import lowest
from .contents import Report
from .images import inline_map, inline_pair
from .plots import bars, dots, interval, lines
from .verdict import fine_percent, percent, span, verdict

__all__ = ["SCHEMA_PATH", "SCHEMA_VERSION", "render_html", "report_dict", "write_report"]

SCHEMA_VERSION = 1
HERE = Path(__file__).parent
SCHEMA_PATH = HERE / "schema.json"
NAME = "report"
VARIANTS = {
    "patched": "with the patch",
    "unedited": "unedited model",
    "negative_prompt": "negative prompt",
    "safe_guidance": "safe guidance",
}
STOPS = 16


def report_dict(report: Report) -> dict[str, Any]:
    """Convert the report to JSON values in the format of ``schema.json``; parts that were not measured are omitted."""
    plain: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "title": report.title,
        "verdict": verdict(report).as_dict(),
        "not_measured": list(report.not_measured),
        "left_out": dict(report.left_out),
    }
    for name in report.measured:
        part = getattr(report, name)
        plain[name] = [one.as_dict() for one in part] if isinstance(part, tuple) else part.as_dict()
    return plain | {"timings": dict(report.timings), "provenance": report.provenance.as_dict()}


def render_html(report: Report) -> str:
    """Render the report as one self-contained HTML text, without scripts or network access.

    Raises:
        ForgetConceptError: If jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError as error:
        raise ForgetConceptError('The report needs jinja2: pip install "forget-concept[cli]".') from error
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        percent=lambda value: _bound(percent(value)),
        span=lambda score: _bound(span(score)),
        fine_percent=lambda value: _bound(fine_percent(value)),
        bound=_bound,
        interval=interval,
        pretty=_pretty,
        size=_size,
        setting_rows=_setting_rows,
    )
    css = (HERE / "report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(
        report=report,
        verdict=verdict(report),
        css=css,
        # the content security policy allows only this style sheet, by its hash
        style_hash="sha256-" + base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        variants=VARIANTS,
        missing=[report.PARTS[name] for name in report.not_measured],
        grids=_by_concept([(grid, [(pair, *inline_pair(pair)) for pair in grid.pairs]) for grid in report.pictures]),
        has_labels=any(pair.before_seen is not None for grid in report.pictures for pair in grid.pairs),
        kinds={name: [row for _, row in rows] for name, rows in _by_concept([(k, k) for k in report.by_kind]).items()},
        lowest=lowest,
        dots=dots,
        maps=[(pair, *inline_map(pair)) for pair in report.attention],
        bars=bars(report.drift) if report.drift else None,
        lines=lines(report.erosion) if report.erosion else None,
        stops=_stops(),
        version=VERSION,
    )


def _stops() -> list[tuple[str, str]]:
    """Offsets and colours of the heat map's legend."""
    at = torch.linspace(0, 1, STOPS)
    colours = (heat(at) * 255).round().int().tolist()
    return [(f"{100 * float(a):.1f}%", "#{:02x}{:02x}{:02x}".format(*rgb)) for a, rgb in zip(at, colours, strict=True)]


def _by_concept(rows: Sequence[tuple[Any, Any]]) -> dict[str, list[tuple[Any, Any]]]:
    """Group pairs by the concept of their first element, in order."""
    groups: dict[str, list[tuple[Any, Any]]] = {}
    for row in rows:
        groups.setdefault(row[0].concept, []).append(row)
    return groups


def _bound(text: str) -> str:
    """Prevent a line break between a number and its percent sign."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _pretty(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _setting_rows(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of settings; strings as they are, everything else as JSON."""
    return [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in settings.items()]


def _size(count: int) -> str:
    """Format a number of bytes with a unit."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000 or unit == "MB":
            break
        count = round(count / 1000)
    return f"{count:,} {unit}"


def write_report(report: Report, target: str | os.PathLike[str]) -> Path:
    """Write the report as an HTML file and a JSON file of the same name, each atomically and the HTML last.

    Args:
        report: The report.
        target: Name of an ``.html`` file, or a folder, which is created if it is missing and receives ``report.html``
            and ``report.json``.

    Returns:
        Path of the HTML file.

    Raises:
        ForgetConceptError: If a file cannot be written, or jinja2 is not installed.
    """
    path = Path(target)
    if path.suffix.lower() in (".html", ".htm") and not path.is_dir():
        html = check_writable(path)
    else:
        html = check_writable(make_folder(check_folder(path)) / f"{NAME}.html")
    beside = check_writable(html.with_suffix(".json"))
    text = render_html(report)
    write_json(beside, report_dict(report))
    write_bytes(html, text.encode())
    return html
