"""Runs a ConceptBench: each concept by each variant of the model, a row after the other.

The protocol is :mod:`.scores`'s, with the benchmark's prompts and any judge, so that it serves the embedded model and a
checkpoint alike.
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

# what is counted for each concept and variant
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
    """:func:`evaluate` with a benchmark's prompts and any judge: ``count`` pictures in each of three cells.

    UA is also given by kind of prompt. Prompts about what is kept name none of the subjects nor of ``without``.
    ``cache`` shares pictures with other measurements of the same model; its own model, judge and sampling then
    count. Raises :class:`RequestError` for concepts that the benchmark or the judge does not have, too few pictures, an
    unknown baseline, and prompts that leave a cell without a question; :class:`ForgetConceptError` where the
    unedited model draws nothing of a cell right.
    """
    check_baselines(baselines)
    if not targets:
        raise RequestError("There is no concept to evaluate: name at least one.")
    cache = cache or SampleCache(model, judge, sampling or SamplingSettings())
    named = [bench.find(subject.concept) for subject in targets]
    left_out = tuple(dict.fromkeys([one.name for one in named] + list(without)))
    plans = []
    for subject, one in zip(targets, named, strict=True):
        cells = bench_questions(bench, judge.names, one.name, count, seed, left_out)
        if not any(question.other_attributes() for question in cells.target):
            raise RequestError(
                f"The first {count} prompts of '{one.name}' name nothing else that could be asked about: ask for more "
                "pictures, or give it compositional prompts with a concept of another category."
            )
        plan = EvaluationPlan(one.name, one.category, cells, build_variants(one.name, subject.patches, baselines))
        plan.request(cache)
        plans.append(plan)
    cache.generate(progress)
    return [score_plan(cache, plan, baselines) for plan in plans]


@dataclass(frozen=True)
class BenchRow:
    """One concept by one variant of the model: :data:`PARTS` as fractions, and the drift of what is kept.

    A part is ``None`` where nothing can be said of it: no prompt asks for it, or the unedited model draws none right.
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
    """A row for each of ``concepts`` and each variant: the unedited model, its ``baselines``, and with patches on.

    ``patches`` gives those of a concept when its turn comes; what it reports is passed on. ``listed`` are prompts of a
    person's lists, by concept. Rows ``done`` (concept, variant) are left out, and nothing is drawn for them alone.
    Each concept is kept in the prompts of the others, unless it is ``without``. Progress counts pictures' steps over
    all that is left. Raises as :func:`evaluate_bench`, before anything is drawn where that can be known.
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
    """How much of all rows is done, in pictures, whichever of them is being drawn."""

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
        """How many pictures the next row takes."""
        if self.left:
            name, variant = self.left[0]
            fresh = len(self.pictures[name] - self.seen)
            self.next_pictures = fresh + (len(self.pictures[name]) if variant != UNEDITED else 0)

    def next(self, name: str, variant: str) -> None:
        """A row is drawn."""
        self.at += self.next_pictures
        self.seen |= self.pictures[name]
        self.left.pop(0)
        self._plan_next()

    def drawing(self, event: ProgressEvent) -> None:
        done = self.at + self.next_pictures * event.step / max(event.total, 1)
        name, variant = self.left[0]
        report_progress(self.progress, ProgressEvent(int(done), self.total, message=f"{name}: {variant}"))

    def passing(self, event: ProgressEvent) -> None:
        """What a method reports while it forgets: no picture is drawn meanwhile."""
        report_progress(self.progress, replace(event, step=self.at, total=self.total))
