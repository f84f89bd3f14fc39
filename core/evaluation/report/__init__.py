"""The report of an evaluation: one self-contained HTML file, and the same values as JSON."""

from __future__ import annotations

from .contents import (
    Attack,
    Drift,
    ErosionStep,
    Grid,
    KindScores,
    Metric,
    MScore,
    Pair,
    PatchFacts,
    Provenance,
    Report,
    grids,
)
from .verdict import ConceptVerdict, Verdict
from .write import SCHEMA_PATH, SCHEMA_VERSION, render_html, report_dict, write_report

__all__ = [
    "SCHEMA_PATH",
    "SCHEMA_VERSION",
    "Attack",
    "ConceptVerdict",
    "Drift",
    "ErosionStep",
    "Grid",
    "KindScores",
    "MScore",
    "Metric",
    "Pair",
    "PatchFacts",
    "Provenance",
    "Report",
    "Verdict",
    "grids",
    "render_html",
    "report_dict",
    "write_report",
]
