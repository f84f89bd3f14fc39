"""Measuring what was forgotten and what was kept, on the embedded model with its probe and on checkpoints with CLIP."""

from __future__ import annotations

from .bench.concept_bench import BenchConcept, ConceptBench, load_bench
from .bench.prompt_lists import ListedPrompt, read_prompts
from .bench.questions import bench_cells
from .bench.results import BenchResults, means
from .bench.run import BenchRow, evaluate_bench, run_bench
from .drawing import (
    Drawings,
    Picture,
    Probe,
    SamplingSettings,
    Seen,
    Variant,
    draw,
    faster_precision,
    faster_threads,
)
from .intervals import Score, paired_ratio, wilson
from .judges import ClipJudge, Judge, WorldJudge
from .mini_table import MiniTable, mini_table
from .scores import (
    BASELINES,
    NEGATIVE,
    PATCHED,
    SAFE,
    UNEDITED,
    Cells,
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
    "BASELINES",
    "NEGATIVE",
    "PATCHED",
    "SAFE",
    "UNEDITED",
    "BenchConcept",
    "BenchResults",
    "BenchRow",
    "Cells",
    "ClipJudge",
    "ConceptBench",
    "Drawings",
    "Evaluation",
    "Example",
    "Judge",
    "ListedPrompt",
    "MiniTable",
    "Picture",
    "Probe",
    "Question",
    "SamplingSettings",
    "Score",
    "Scores",
    "Seen",
    "Subject",
    "Variant",
    "WorldJudge",
    "bench_cells",
    "draw",
    "evaluate",
    "evaluate_bench",
    "faster_precision",
    "faster_threads",
    "kept_questions",
    "known_concept",
    "load_bench",
    "means",
    "mini_table",
    "paired_ratio",
    "read_prompts",
    "run_bench",
    "target_questions",
    "wilson",
]
