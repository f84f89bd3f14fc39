"""Measuring what was forgotten and what was kept, on the embedded model and with its probe."""

from __future__ import annotations

from .drawing import Drawings, Picture, Probe, Sampling, Seen, Variant, draw, faster_precision, from_bytes, to_bytes
from .intervals import Score, paired_ratio, wilson
from .mini_table import MiniTable, mini_table
from .scores import (
    NEGATIVE,
    PATCHED,
    UNEDITED,
    Evaluation,
    Example,
    Question,
    Scores,
    Subject,
    evaluate,
    kept_questions,
    known_concept,
    target_questions,
)

__all__ = [
    "NEGATIVE",
    "PATCHED",
    "UNEDITED",
    "Drawings",
    "Evaluation",
    "Example",
    "MiniTable",
    "Picture",
    "Probe",
    "Question",
    "Sampling",
    "Score",
    "Scores",
    "Seen",
    "Subject",
    "Variant",
    "draw",
    "evaluate",
    "faster_precision",
    "from_bytes",
    "kept_questions",
    "known_concept",
    "mini_table",
    "paired_ratio",
    "target_questions",
    "to_bytes",
    "wilson",
]
