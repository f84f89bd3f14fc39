"""Evaluation of concept erasure and retention, with the probe on the embedded model and with CLIP on checkpoints."""

from __future__ import annotations

from .bench.concept_bench import BenchConcept, ConceptBench, load_bench
from .bench.prompt_lists import ListedPrompt, read_prompts
from .bench.questions import bench_questions
from .bench.results import BenchResults, mean_scores
from .bench.run import BenchRow, evaluate_bench, run_bench
from .drawing import (
    ImageClassifier,
    LabeledImage,
    Picture,
    SampleCache,
    SamplingSettings,
    Variant,
    draw,
    faster_precision,
    faster_threads,
)
from .intervals import Score, paired_ratio, wilson
from .judges import ClipJudge, Judge, WorldJudge
from .mini_table import MiniTable, mini_table
from .questions import Question, find_concept, retain_questions, target_questions
from .scores import (
    BASELINES,
    NEGATIVE,
    PATCHED,
    SAFE,
    UNEDITED,
    Evaluation,
    EvaluationTarget,
    Example,
    QuestionSets,
    Scores,
    evaluate,
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
    "ClipJudge",
    "ConceptBench",
    "Evaluation",
    "EvaluationTarget",
    "Example",
    "ImageClassifier",
    "Judge",
    "LabeledImage",
    "ListedPrompt",
    "MiniTable",
    "Picture",
    "Question",
    "QuestionSets",
    "SampleCache",
    "SamplingSettings",
    "Score",
    "Scores",
    "Variant",
    "WorldJudge",
    "bench_questions",
    "draw",
    "evaluate",
    "evaluate_bench",
    "faster_precision",
    "faster_threads",
    "find_concept",
    "load_bench",
    "mean_scores",
    "mini_table",
    "paired_ratio",
    "read_prompts",
    "retain_questions",
    "run_bench",
    "target_questions",
    "wilson",
]
