"""Run a ConceptBench: one row per concept and model variant.

The protocol is that of :mod:`.scores`, with the benchmark's prompts and any judge, so that it works for the embedded
model and for checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...errors import RequestError
from ...models.latent_diffusion import LatentDiffusion
from ...patch.patch import Patch
from ...progress import Progress, ProgressEvent, report_progress
from ..drawing import SampleCache, SamplingSettings
from ..intervals import Score
from ..judges import Judge
from ..scores import (
    BASELINES,
    PATCHED,
    UNEDITED,
    Evaluation,
    EvaluationPlan,
    EvaluationTarget,
    QuestionSets,
    build_variants,
    check_baselines,
    image_drift,
    score_plan,
    score_variant,
)
from .concept_bench import PROMPT_KINDS, BenchConcept, ConceptBench
from .prompt_lists import ListedPrompt
from .questions import LISTED, bench_questions

__all__ = ["PARTS", "BenchRow", "Patches", "evaluate_bench", "run_bench"]

# scores of each concept and variant
PARTS = ("ua", *(f"ua_{kind}" for kind in (*PROMPT_KINDS, LISTED)), "ira", "neighbours", "cra", "cra_target")
Patches = tuple[tuple[Patch, float], ...]


def evaluate_bench(
    model: LatentDiffusion,
    judge: Judge,
    bench: ConceptBench,
    targets: Sequence[EvaluationTarget],
    count: int = 24,
    seed: int = 0,
    sampling: SamplingSettings | None = None,
    *,
    without: Sequence[str] = (),
    baselines: Sequence[str] = BASELINES,
    progress: Progress | None = None,
    cache: SampleCache | None = None,
) -> list[Evaluation]:
    """Evaluate targets like :func:`evaluate`, with a benchmark's prompts and any judge.

    UA is also reported by kind of prompt. Retain prompts name none of the targets and nothing in ``without``.

    Args:
        model: The model.
        judge: Classifies the images.
        bench: Provides the prompts.
        targets: Concepts and their patches.
        count: Images in each of the three cells.
        seed: Seed of prompts and images.
        sampling: Sampling settings. Default: :class:`SamplingSettings`.
        without: Further concepts to exclude from the retain set.
        baselines: Baselines to compare with.
        progress: Receives sampling progress.
        cache: Shares images with other measurements; its model, judge and sampling settings take precedence.

    Returns:
        One :class:`Evaluation` per target.

    Raises:
        RequestError: If the benchmark or the judge does not know a concept, there are too few images, a baseline is
            unknown, or a cell has no questions.
        ForgetConceptError: If the unedited model draws nothing of a cell correctly.
    """
    check_baselines(baselines)
    if not targets:
        raise RequestError("There is no concept to evaluate: name at least one.")
    cache = cache or SampleCache(model, judge, sampling or SamplingSettings())
    named = [bench.find(target.concept) for target in targets]
    excluded = tuple(dict.fromkeys([one.name for one in named] + list(without)))
    plans = []
    for target, one in zip(targets, named, strict=True):
        cells = bench_questions(bench, judge.names, one.name, count, seed, excluded)
        if not any(question.other_attributes() for question in cells.target):
            raise RequestError(
                f"The first {count} prompts of '{one.name}' name no concept of another category to check: use more "
                "images, or add compositional prompts with such a concept."
            )
        plan = EvaluationPlan(one.name, one.category, cells, build_variants(one.name, target.patches, baselines))
        plan.request(cache)
        plans.append(plan)
    cache.generate(progress)
    return [score_plan(cache, plan, baselines) for plan in plans]


@dataclass(frozen=True)
class BenchRow:
    """Scores of one concept and one model variant: :data:`PARTS` as fractions, and the image drift on the retain set.

    A part is ``None`` if it has no prompts or the unedited model draws none of them correctly.
    """

    concept: str
    category: str
    variant: str
    n_target: int
    n_kept: int
    scores: Mapping[str, Score | None] = field(default_factory=dict)
    drift: float = 0.0

    def as_dict(self) -> dict[str, object]:
        return {
            "concept": self.concept,
            "category": self.category,
            "variant": self.variant,
            "n_target": self.n_target,
            "n_kept": self.n_kept,
            "scores": {part: None if score is None else score.as_dict() for part, score in self.scores.items()},
            "drift": self.drift,
        }


def run_bench(
    judge: Judge,
    bench: ConceptBench,
    concepts: Sequence[str],
    patches: Callable[[BenchConcept, Progress], Patches],
    cache: SampleCache,
    count: int = 24,
    seed: int = 0,
    *,
    without: Sequence[str] = (),
    listed: Mapping[str, Sequence[ListedPrompt]] | None = None,
    baselines: Sequence[str] = BASELINES,
    done: Collection[tuple[str, str]] = (),
    progress: Progress | None = None,
) -> Iterator[BenchRow]:
    """Yield one row per concept and model variant: the unedited model, the baselines, and the patched model.

    Each concept belongs to the retain set of the others, unless it is in ``without``.

    Args:
        judge: Classifies the images.
        bench: Provides the prompts.
        concepts: Names of the concepts.
        patches: Called for each concept when its turn comes; returns its patches. Its progress is passed on.
        cache: Samples and caches the images.
        count: Images in each of the three cells.
        seed: Seed of prompts and images.
        without: Further concepts to exclude from the retain set.
        listed: Prompts from the user's lists, by concept.
        baselines: Baselines to compare with.
        done: Rows (concept, variant) to skip.
        progress: Receives the number of sampled images, over all remaining rows.

    Raises:
        RequestError: As :func:`evaluate_bench`, before any image is sampled if possible.
        ForgetConceptError: As :func:`evaluate_bench`.
    """
    check_baselines(baselines)
    listed = {bench.find(name).name: prompts for name, prompts in (listed or {}).items()}
    names = list(dict.fromkeys(bench.find(name).name for name in concepts))
    if not names:
        raise RequestError("There is no concept to measure: name at least one.")
    order = [name for name in build_variants(names[0], (), baselines) if name != PATCHED] + [PATCHED]
    cells: dict[str, QuestionSets] = {
        name: bench_questions(bench, judge.names, name, count, seed, without, listed.get(name, ())) for name in names
    }
    left = [(name, variant) for name in names for variant in order if (name, variant) not in done]
    tracker = _BenchProgress(cells, left, cache, progress)
    for name, variant in left:
        concept = bench.find(name)
        found: Patches = patches(concept, tracker.passing) if variant == PATCHED else ()
        variants = build_variants(name, found, baselines)
        plan = EvaluationPlan(name, concept.category, cells[name], {v: variants[v] for v in (UNEDITED, variant)})
        plan.request(cache)
        cache.generate(tracker.drawing)
        tracker.next(name, variant)
        yield BenchRow(
            name,
            concept.category,
            variant,
            len(plan.cells.target),
            len(plan.cells.in_domain) + len(plan.cells.cross_domain),
            score_variant(cache, plan, variant),
            image_drift(cache, plan, variant),
        )
        if variant != UNEDITED:
            cache.discard(variants[variant])


class _BenchProgress:
    """Tracks progress over all rows, in images."""

    def __init__(
        self,
        cells: Mapping[str, QuestionSets],
        left: Sequence[tuple[str, str]],
        cache: SampleCache,
        progress: Progress | None,
    ) -> None:
        self.progress = progress
        self.pictures = {name: {question.picture for question in some.all} for name, some in cells.items()}
        self.seen: set[object] = set()
        self.at = 0
        base = set().union(*(self.pictures[name] for name, _ in left)) if left else set()
        self.total = len(base) + sum(len(self.pictures[name]) for name, variant in left if variant != UNEDITED)
        self.next_pictures = 0
        self.left = list(left)
        self._plan_next()

    def _plan_next(self) -> None:
        """Compute the number of images of the next row."""
        if self.left:
            name, variant = self.left[0]
            fresh = len(self.pictures[name] - self.seen)
            self.next_pictures = fresh + (len(self.pictures[name]) if variant != UNEDITED else 0)

    def next(self, name: str, variant: str) -> None:
        """Record that a row is complete."""
        self.at += self.next_pictures
        self.seen |= self.pictures[name]
        self.left.pop(0)
        self._plan_next()

    def drawing(self, event: ProgressEvent) -> None:
        done = self.at + self.next_pictures * event.step / max(event.total, 1)
        name, variant = self.left[0]
        report_progress(self.progress, ProgressEvent(int(done), self.total, message=f"{name}: {variant}"))

    def passing(self, event: ProgressEvent) -> None:
        """Pass on the progress of a method's fit, during which no images are sampled."""
        report_progress(self.progress, replace(event, step=self.at, total=self.total))
