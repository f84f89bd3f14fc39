"""Does the M-Score tell what is forgotten from what is kept? The concepts of the embedded world, once each way.

`python benchmarks/m_score.py` takes some quarter of an hour of one core and fills `m_score.csv`, a row a concept,
state, kind of pictures and restart; rows that are there are not made again, and an inversion that was cut short goes
on. The 27 concepts are all but the seven that the inversion's settings were chosen on. They are dealt to three patches
(`uce`, its tuned preset), so that each patch forgets nine, of all three categories, and preserves the others; every
concept is measured under the patch that forgets it (`forgotten`) and under the next one, which keeps it (`kept`), with
the same pictures and the same unedited inversions. The eight `pictures` are either `rendered`, of any style and
background, as a person's own may be, or `drawn` by the unedited model from the concept's plain prompts.

`<space>_before` and `<space>_after` are the cosines of `core/evaluation/m_score.py` in each of its spaces; the score is
their drop, the mean over restarts. Printed is how well each separates the two states: the area under the ROC curve with
a 95 % interval (bootstrap over concepts), and the threshold that errs least. `shown` is the share of `n` pictures,
drawn by the patched model from prompts that name the concept, in which the probe finds it: what was to be forgotten may
not be. `seconds` are wall clock of the inversions, two of them, or one where the unedited model's is there already.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from harness import Table, Watch, costing
from methods import embedded, pictures_of

from forget_concept.core.errors import ForgetConceptError
from forget_concept.core.evaluation import ImageClassifier, SampleCache, SamplingSettings, Variant, target_questions
from forget_concept.core.evaluation.m_score import RESTARTS, SPACES, concept_latents, m_score
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.methods.fit import fit
from forget_concept.core.methods.registry import plan_request
from forget_concept.core.mini.vocabulary import CATEGORIES
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

# the inversion's settings were chosen on these
CHOSE = ("star", "fish", "moon", "house", "neon", "Hugo Marsh", "Ivy Stone")
CONCEPTS = tuple(
    Concept(word.name, kind) for kind, words in CATEGORIES.items() for word in words if word.name not in CHOSE
)
PATCHES, IMAGES = 3, 8
STATES, PICTURES = ("forgotten", "kept"), ("rendered", "drawn")
KEY = ["model", "category", "concept", "state", "pictures", "restart"]
COLUMNS = [
    *KEY,
    *(f"{space}_{when}" for space in SPACES for when in ("before", "after")),
    *("tokens", "steps", "lr", "shown", "n", "seconds"),
]


def dealt() -> list[list[Concept]]:
    """The concepts of each patch, each with what is shown instead: the next of its category that the patch keeps."""
    found: list[list[Concept]] = [[] for _ in range(PATCHES)]
    for kind in CATEGORIES:
        here = [concept.name for concept in CONCEPTS if concept.kind == kind]
        for i, name in enumerate(here):
            after = ((i + k) % len(here) for k in range(1, len(here)))
            instead = next(here[j] for j in after if j % PATCHES != i % PATCHES)
            found[i % PATCHES].append(Concept(name, kind, instead))
    return found


def patch_of(model: LatentDiffusion, concepts: Sequence[Concept]) -> Patch:
    names = {concept.name for concept in concepts}
    kept = tuple(word.name for words in CATEGORIES.values() for word in words if word.name not in names)
    return fit(model, plan_request(ForgetRequest(tuple(concepts), preserve=kept, method="uce")))


def plans() -> list[tuple[Concept, str, int]]:
    """``(concept, state, patch)``, the states of a concept one after the other."""
    groups = dealt()
    of = {concept.name: k for k, group in enumerate(groups) for concept in group}
    return [
        (concept, state, (of[concept.name] + (state == "kept")) % PATCHES) for concept in CONCEPTS for state in STATES
    ]


# -- what it comes to ---------------------------------------------------------------------------------------------


def auc(forgotten: Sequence[float], kept: Sequence[float]) -> float:
    """Area under the ROC curve: how often a forgotten concept's value is above a kept one's (ties count half)."""
    a, b = np.asarray(forgotten)[:, None], np.asarray(kept)[None, :]
    return float(((a > b) + 0.5 * (a == b)).mean())


def summary(rows: Sequence[Mapping[str, str]], draws: int = 2000) -> str:
    """For each kind of pictures :func:`_summary`."""
    return "\n".join(_summary([row for row in rows if row["pictures"] == which], which, draws) for which in PICTURES)


def _summary(rows: Sequence[Mapping[str, str]], pictures: str, draws: int) -> str:
    """A line for each space: its AUC by the drop and by the cosine after alone, and the threshold that errs least."""
    both: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        both.setdefault((row["concept"], row["state"]), []).append(row)
    names = sorted({name for name, _ in both if all((name, state) in both for state in STATES)})
    if not names:
        return f"No concept is there in both states yet with {pictures} pictures."
    lines = [f"{len(names)} concepts, each once forgotten and once kept, by {pictures} pictures"]
    for space in SPACES:

        def values(state: str, after: bool = False, space: str = space) -> np.ndarray:
            picked = [both[name, state] for name in names]
            ends = np.array(
                [
                    [np.mean([float(row[f"{space}_{when}"]) for row in several]) for when in ("before", "after")]
                    for several in picked
                ]
            )
            return -ends[:, 1] if after else ends[:, 0] - ends[:, 1]

        forgotten, kept = values("forgotten"), values("kept")
        random = np.random.default_rng(0)
        some = [random.integers(len(names), size=(2, len(names))) for _ in range(draws)]
        low, high = np.quantile([auc(forgotten[i], kept[j]) for i, j in some], [0.025, 0.975])
        # halfway between two neighbours; the errors of both sides count alike
        edges = np.sort(np.concatenate([forgotten, kept]))
        middles = (edges[1:] + edges[:-1]) / 2
        errors = [int((forgotten <= m).sum() + (kept > m).sum()) for m in middles]
        best = int(np.argmin(errors))
        lines.append(
            f"{space:>11}: AUC {auc(forgotten, kept):.3f} ({low:.3f}–{high:.3f}) by the drop, "
            f"{auc(values('forgotten', True), values('kept', True)):.3f} by the cosine after alone; drop "
            f"{forgotten.mean():.3f} ± {forgotten.std():.3f} forgotten, {kept.mean():.3f} ± {kept.std():.3f} kept; "
            f"a threshold of {middles[best]:.3f} errs {errors[best]} times in {len(edges)}"
        )
    return "\n".join(lines)


# -- the command --------------------------------------------------------------------------------------------------


def shown(model: LatentDiffusion, probe: ImageClassifier, concept: Concept, patch: Patch, count: int) -> float:
    """How often the patched model still draws the concept where a prompt names it."""
    questions = target_questions(concept.name, count)
    cache, variant = SampleCache(model, probe, SamplingSettings(precision="float32")), Variant(((patch, 1.0),))
    cache.request(variant, [question.picture for question in questions])
    cache.generate()
    seen = cache.get(variant, [question.picture for question in questions])
    return sum(q.is_correct(s) for q, s in zip(questions, seen, strict=True)) / count


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--restarts", type=int, default=RESTARTS, help="inversions of each concept and state")
    parser.add_argument("--count", type=int, default=0, help="pictures that check each state, once")
    parser.add_argument("--limit", type=int, help="only the first so many rows")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("m_score.csv"))
    kept = Path(tempfile.gettempdir()) / "forget-concept-m-score"
    parser.add_argument("--work", type=Path, default=kept, help="a folder that keeps the inversions")
    options = parser.parse_args(argv)
    try:
        table = Table(options.out, COLUMNS, KEY)
        every = [
            (*plan, which, restart) for restart in range(options.restarts) for which in PICTURES for plan in plans()
        ]
        todo = [plan for plan in every[: options.limit] if not table.has(_key(*plan))]
        if todo:
            model, probe, _ = embedded(options.device)
            _measure(model, probe, todo, table, options)
    except ForgetConceptError as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(table.rows))
    return 0


def _key(concept: Concept, state: str, patch: int, pictures: str, restart: int) -> dict[str, object]:
    return {
        "model": "mini",
        "category": concept.kind,
        "concept": concept.name,
        "state": state,
        "pictures": pictures,
        "restart": restart,
    }


def _measure(
    model: LatentDiffusion,
    probe: ImageClassifier,
    todo: Sequence[tuple[Concept, str, int, str, int]],
    table: Table,
    options: argparse.Namespace,
) -> None:
    workspace = Workspace(options.work)
    patches = [patch_of(model, group) for group in dealt()]
    with Watch(len(todo)) as watch:
        for concept, state, k, which, restart in todo:
            watch.name = f"{concept.name} {state}"
            images = pictures_of(concept, IMAGES, 0) if which == "rendered" else None
            latents = concept_latents(model, concept, images, IMAGES, progress=watch, workspace=workspace)
            applied = ((patches[k], 1.0),)
            with costing(model) as cost:
                found = m_score(
                    model, concept, latents, applied, seed=restart, progress=watch, workspace=workspace, restarts=1
                )
            count = options.count if (which, restart) == (PICTURES[0], 0) else 0
            row = _key(concept, state, k, which, restart) | {
                "tokens": found.settings.tokens,
                "steps": found.settings.steps,
                "lr": found.settings.lr,
                "shown": shown(model, probe, concept, patches[k], count) if count else None,
                "n": count,
                "seconds": cost.seconds,
            }
            for space, (before, after) in found.similarities.items():
                row |= {f"{space}_before": before, f"{space}_after": after}
            table.append(row)
            watch.done()


if __name__ == "__main__":
    sys.exit(main())
