"""Every method with its presets on the embedded model, a row a run: `make bench-methods`.

Screening (the default) forgets one concept of each category under one seed; `--full` three of each under three seeds.
Both measure with 100 pictures in each cell of an evaluation (`n`), and rows of both are comparable: prompts about what
is kept name none of the nine concepts. A row that is there is not run again; rows are appended as runs finish, and
`methods.md` beside the table sums them up. None of the nine concepts chose the tuned settings (tree, mosaic and Hugo
Marsh did).

Each request has a replacement and preserves the other concepts of its category. Some presets take no replacement or
nothing to preserve: they are asked first (a request that is refused costs nothing), and what they refuse is left out,
with a note in the summary; a preset that needs pictures gets eight drawn ones of the concept. `none` is the unedited
model, `negative_prompt` the unedited model with the concept as its negative prompt, `safe_guidance` the unedited model
under Safe Latent Diffusion's guidance away from the concept (its published medium configuration). A row is attacked
(`core/evaluation/attacks/`) after it was measured; one that was not attacked yet is fitted again for it.

- `ua`, `ira`, `cra`: unlearning accuracy, in-domain and cross-domain retain accuracy (`core/evaluation/scores.py`);
- `drift`: root-mean-square difference of pixels in [0, 1] between the edited and the unedited model's picture of the
  same kept prompt and seed, the mean over the 2n kept prompts;
- `seconds`: wall clock of the fit alone, with all that it draws and trains, nothing taken from an earlier run;
- `forward_passes`, `backward_passes`: pictures that went through the UNet in the fit, and gradients that came back
  through it (a guided step of one picture is two passes); measuring is not in them;
- `peak_bytes`: on CUDA the most that torch had allocated during the fit, the model included; on a CPU the growth of the
  process' resident set over what it was before, the model not included; empty where neither can be known;
- `patch_bytes`: of all factors in fp32;
- `attack_...`: share of pictures in which the concept came back, by attack; `attack_success` is the highest of them,
  `attack_budget` what each was allowed (`core/evaluation/attacks/budget.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Cost, SharedSampleCache, Table, Watch, costing, device_name
from methods_summary import first_of_each_kind, write_summary

from forget_concept.core import mini
from forget_concept.core.errors import Cancelled, ForgetConceptError, RequestError
from forget_concept.core.evaluation import (
    NEGATIVE,
    PATCHED,
    SAFE,
    UNEDITED,
    EvaluationTarget,
    SamplingSettings,
    Variant,
    evaluate,
)
from forget_concept.core.evaluation.attacks import ATTACKS, BUDGETS, ProbeJudge, Target, run_attacks
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.methods.base import Inputs
from forget_concept.core.methods.fit import fit
from forget_concept.core.methods.registry import all_methods, get, plan_request
from forget_concept.core.mini import world
from forget_concept.core.mini.vocabulary import CATEGORIES, NONE
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.safe_guidance import SafetyGuidance
from forget_concept.core.patch.patch import Patch
from forget_concept.core.progress import Progress, ProgressEvent
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.request.settings import resolve_settings

NOTHING, BASELINES = "none", ("none", NEGATIVE, SAFE)
PRESETS = ("published", "tuned")
# the first of each category is the screening's
CONCEPTS = (
    Concept("star", "object", "circle"),
    Concept("neon", "style", "sketch"),
    Concept("Lena Frost", "identity", "Nadia Pell"),
    Concept("fish", "object", "arrow"),
    Concept("watercolour", "style", "dotted"),
    Concept("Bruno Finch", "identity", "Otto Brand"),
    Concept("key", "object", "cup"),
    Concept("comic", "style", "striped"),
    Concept("Zuri Okoye", "identity", "Ivy Stone"),
)
SCREENING = CONCEPTS[:3]
ATTACKED = ("attack_budget", "attack_success", *(f"attack_{name}" for name in ATTACKS))
KEY = ["model", "method", "preset", "gradient", "category", "concept", "seed", "n"]
COLUMNS = [
    *("model", "method", "preset", "gradient", "category", "concept", "seed", "ua", "ira", "cra", "n", "drift"),
    *("seconds", "forward_passes", "backward_passes", "peak_bytes", "patch_bytes"),
    *ATTACKED,
]
COUNT, SEEDS = 100, (0, 1, 2)
IMAGES = 8
# rough cost of a training, in pictures through the UNet a step and row of the batch (there, back, and what is kept)
PASSES_A_ROW = 6


@dataclass(frozen=True)
class Run:
    """One row to be: a method's preset under a gradient rule (``""`` where it has none) on a concept and a seed."""

    method: str
    preset: str
    gradient: str
    concept: Concept
    seed: int

    @property
    def forgets(self) -> bool:
        return self.method not in BASELINES

    def key(self, model: str, count: int) -> dict[str, Any]:
        return {
            "model": model,
            "method": self.method,
            "preset": self.preset,
            "gradient": self.gradient,
            "category": self.concept.kind,
            "concept": self.concept.name,
            "seed": self.seed,
            "n": count,
        }

    def __str__(self) -> str:
        words = (self.method, self.preset, self.gradient, self.concept.name, f"seed {self.seed}")
        return " ".join(word for word in words if word)


def planned(
    methods: Sequence[str],
    presets: Sequence[str],
    gradients: Sequence[str],
    concepts: Sequence[Concept],
    seeds: Sequence[int],
) -> list[Run]:
    """Every run of these; without ``gradients`` each preset has its own rule. Raises :class:`RequestError`."""
    kinds: list[tuple[str, str, str]] = []
    for method in methods:
        if method in BASELINES:
            kinds.append((method, "", ""))
            continue
        for preset in presets:
            own = getattr(resolve_settings(get(method), preset, {}), "gradient", "")
            kinds += [(method, preset, rule) for rule in ((gradients or [own]) if own else [""])]
    return [Run(*kind, concept, seed) for seed in seeds for kind in kinds for concept in concepts]


# -- asking a method ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FullestRequest:
    """A request that a method takes, what goes with it, and what had to be left out or added, in words."""

    request: ForgetRequest
    inputs: Inputs
    note: str


def asked(model: LatentDiffusion, run: Run, preserve: Sequence[str] | None = None) -> FullestRequest:
    """The fullest request that the method does not refuse; raises the first :class:`RequestError` where it takes none.

    ``preserve`` is the list to keep (default: the other concepts of the category).

    A fit is begun and cancelled at its first sign of progress, by which time what it would refuse is refused. (A closed
    form shows none and is done by then.)
    """
    first: RequestError | None = None
    for images in (False, True) if get(run.method).takes_images else (False,):
        for replaced, preserved in ((True, True), (False, True), (True, False), (False, False)):
            found = _asked(run, replaced, preserved, images, preserve)
            try:
                fit(model, plan_request(found.request), _stop, found.inputs)
            except RequestError as error:
                first = first or error
                continue
            except Cancelled:
                pass
            return found
    assert first is not None
    raise first


def _asked(run: Run, replaced: bool, preserved: bool, images: bool, preserve: Sequence[str] | None) -> FullestRequest:
    concept = run.concept
    names = [word.name for word in CATEGORIES[concept.kind]] if preserve is None else preserve
    others = tuple(name for name in names if name != concept.name)
    request = ForgetRequest(
        (concept if replaced else dataclasses.replace(concept, replacement=None),),
        preserve=others if preserved else (),
        method=run.method,
        preset=run.preset,
        settings={"gradient": run.gradient} if run.gradient else {},
        seed=run.seed,
    )
    inputs = Inputs(images={concept.name: pictures_of(concept, IMAGES, run.seed)} if images else {})
    without = [words for kept, words in ((replaced, "a replacement"), (preserved, "a preserve list")) if not kept]
    note = f"without {' and '.join(without)}" if without else ""
    return FullestRequest(request, inputs, "; ".join(filter(None, (note, f"with {IMAGES} pictures" if images else ""))))


def _stop(event: ProgressEvent) -> None:
    raise Cancelled


def pictures_of(concept: Concept, count: int, seed: int) -> torch.Tensor:
    """Drawn pictures ``(count, 3, 128, 128)`` in [-1, 1] that show a concept of the world."""
    draws = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        scene = world.sample_scene(draws)
        if concept.kind == "style":
            scene = dataclasses.replace(scene, style=concept.name)
        elif concept.kind == "object":
            colour = scene.colour if scene.colour != NONE else "red"
            scene = dataclasses.replace(scene, shape=concept.name, person=NONE, attributes=(), colour=colour)
        else:
            scene = dataclasses.replace(scene, person=concept.name, shape=NONE, colour=NONE, attributes=())
        found.append(torch.from_numpy(world.render(scene).copy()).permute(2, 0, 1))
    return torch.stack(found).float() / 127.5 - 1


# -- one run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """What a run made: its pictures' variant, and what it cost."""

    variant: str
    patches: tuple[tuple[Patch, float], ...]
    cost: Cost

    def asked_of(self, concept: str) -> Variant:
        """The model that an attack is put to."""
        safe = SafetyGuidance(concept) if self.variant == SAFE else None
        return Variant(self.patches, concept if self.variant == NEGATIVE else "", safe)


def fitted(model: LatentDiffusion, run: Run, progress: Progress | None) -> Fitted:
    """Fit a run's method. Raises :class:`ForgetConceptError` where it refuses or fails."""
    if not run.forgets:
        return Fitted(run.method if run.method in (NEGATIVE, SAFE) else PATCHED, (), Cost())
    wanted = asked(model, run)
    with costing(model) as cost:
        patch: Patch = fit(model, plan_request(wanted.request), progress, wanted.inputs)
    return Fitted(PATCHED, ((patch, 1.0),), cost)


def measured(
    model: LatentDiffusion,
    probe: Any,
    run: Run,
    made: Fitted,
    count: int,
    cache: SharedSampleCache,
    progress: Progress | None,
) -> dict[str, Any]:
    """The row of a run, not attacked yet."""
    variant, cost = made.variant, made.cost
    (found,) = evaluate(
        model,
        probe,
        [EvaluationTarget(run.concept.name, made.patches)],
        count,
        run.seed,
        without=[concept.name for concept in CONCEPTS],
        baselines=(UNEDITED,) if variant == PATCHED else (UNEDITED, variant),
        progress=progress,
        cache=cache,
    )
    cache.release()
    scores = found.scores[variant]
    return run.key(model.name, count) | {
        "ua": scores.ua.value,
        "ira": scores.ira.value,
        "cra": scores.cra.value,
        "drift": found.drift[variant],
        "seconds": cost.seconds,
        "forward_passes": cost.forward,
        "backward_passes": cost.backward,
        "peak_bytes": cost.peak,
        "patch_bytes": made.patches[0][0].nbytes if made.patches else 0,
        **dict.fromkeys(ATTACKED),
    }


def attacked(
    model: LatentDiffusion,
    probe: Any,
    run: Run,
    made: Fitted,
    budget: str,
    sampling: SamplingSettings,
    workspace: Workspace | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """A row's cells of attacks; an attack that cannot be made on this model is left empty."""
    name = run.concept.name
    found = run_attacks(
        model,
        made.asked_of(name),
        Target.embedded(name),
        ProbeJudge(probe, name),
        budget,
        run.seed,
        before=False,
        sampling=sampling,
        workspace=workspace,
        progress=progress,
    )
    cells = {f"attack_{one.attack}": one.after.value for one in found.results}
    return dict.fromkeys(ATTACKED) | cells | {"attack_budget": budget, "attack_success": found.attack_success.value}


# -- the estimate -------------------------------------------------------------------------------------------------


def pictures_to_draw(runs: Sequence[Run], count: int) -> int:
    """How many pictures measuring takes: three cells a run, and the unedited model's, shared by all of a seed."""
    shared = {(run.seed, run.concept.name) for run in runs}
    plain = len(shared) * count + len({seed for seed, _ in shared}) * 3 * count
    return plain + sum(3 * count for run in runs if run.method != NOTHING)


def fit_passes(run: Run) -> int:
    """Pictures through the UNet in a fit, guessed from its settings; right within a small factor."""
    if not run.forgets:
        return 0
    settings = resolve_settings(get(run.method), run.preset, {"gradient": run.gradient} if run.gradient else {})

    def sized(name: str, default: int = 0) -> int:
        return getattr(settings, name, default)

    drawn = 2 * sized("sample_steps") * (2 * sized("n_images") + sized("replay_images"))
    importance = 3 * 2 * sized("fisher_draws") * sized("fisher_samples")
    return PASSES_A_ROW * sized("steps") * sized("batch_size", 1) + drawn + importance


def seconds_a_pass(model: LatentDiffusion, sampling: SamplingSettings) -> float:
    """Of one picture through the UNet without gradient, in a batch as in an evaluation."""
    batch = sampling.batch
    with costing(model) as cost:
        model.sample([""] * batch, range(batch), steps=2, guidance=sampling.guidance, batch=batch)
    return cost.seconds / cost.forward


def told(runs: Sequence[Run], table: Table, model: LatentDiffusion, sampling: SamplingSettings, count: int) -> str:
    """What is to do, in words: a line a run, and how long all of it may take here, attacks apart."""
    one = seconds_a_pass(model, sampling)
    known: dict[tuple[str, str, str], list[float]] = {}
    for row in table.rows:
        known.setdefault((row["method"], row["preset"], row["gradient"]), []).append(float(row["seconds"]))
    lines, total = [], 0.0
    for run in runs:
        before = known.get((run.method, run.preset, run.gradient))
        fitting = sum(before) / len(before) if before else fit_passes(run) * one
        total += fitting
        lines.append(f"{run}: about {fitting:.0f} s to fit" if run.forgets else f"{run}: nothing to fit")
    drawn = pictures_to_draw([run for run in runs if not table.has(run.key(model.name, count))], count)
    drawing = drawn * 2 * sampling.steps * one
    lines.append(
        f"{len(runs)} runs: about {total / 60:.0f} min of fitting, and {drawn} pictures to measure with, about "
        f"{drawing / 60:.0f} min, on {device_name(model.device)}."
    )
    return "\n".join(lines)


# -- the command --------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Run every method on the embedded model, and tabulate what comes out.")
    p.add_argument("--full", action="store_true", help="three concepts a category and three seeds, not one and one")
    p.add_argument("--method", action="append", help="only these (default: all, and the baselines)")
    p.add_argument("--preset", action="append", help=f"only these (default: {' and '.join(PRESETS)})")
    p.add_argument("--gradient", action="append", help="for trained methods (default: the preset's own)")
    p.add_argument("--concept", action="append", choices=[c.name for c in CONCEPTS], help="only these")
    p.add_argument("--count", type=int, default=COUNT, help="pictures in each cell of an evaluation (default: 100)")
    p.add_argument("--seed", type=int, action="append", help="of the fit and of the pictures (default: 0; full: 0 1 2)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--steps", type=int, default=SamplingSettings.steps, help="sampling steps while measuring")
    p.add_argument("--batch", type=int, default=SamplingSettings.batch, help="pictures drawn at a time while measuring")
    p.add_argument("--precision", default=SamplingSettings.precision, help="while measuring: auto, float32 or bfloat16")
    p.add_argument("--out", type=Path, default=Path(__file__).with_name("methods.csv"))
    p.add_argument(
        "--attack", choices=(*BUDGETS, "none"), default="quick", help="what an attack may spend (default: quick)"
    )
    p.add_argument(
        "--work", type=Path, help="a folder that keeps the unedited model's pictures and the attacks' for later runs"
    )
    p.add_argument("--dry-run", action="store_true", help="say what would be run and how long it may take")
    return p


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def embedded(device: str) -> tuple[LatentDiffusion, Any, str]:
    """The embedded model and its probe on a device, and the probe's hash."""
    probe = mini.load_probe().to(device)
    return mini.load(device), probe, _file_hash(mini.weights_folder() / "probe.safetensors")


def main(argv: Sequence[str] | None = None, load: Any = embedded) -> int:
    """0; 1 where a run failed (the others are made all the same); 2 where nothing could be run."""
    options = parser().parse_args(argv)
    try:
        return _main(options, load)
    except ForgetConceptError as error:
        print(error, file=sys.stderr)
        return 2


def _main(options: argparse.Namespace, load: Any) -> int:
    methods = options.method or [*BASELINES, *all_methods()]
    concepts = CONCEPTS if options.full else SCREENING
    if options.concept:
        concepts = tuple(c for c in CONCEPTS if c.name in options.concept)
    seeds = options.seed or (SEEDS if options.full else SEEDS[:1])
    runs = planned(methods, options.preset or PRESETS, options.gradient or [], concepts, seeds)
    table = Table(options.out, COLUMNS, KEY)
    model, probe, by = load(options.device)
    keys = {run: run.key(model.name, options.count) for run in runs}
    attacks = options.attack != "none"
    todo = [run for run in runs if not table.has(keys[run]) or (attacks and not table.row(keys[run])["attack_budget"])]
    sampling = SamplingSettings(options.steps, batch=options.batch, precision=options.precision)
    if options.dry_run:
        print(told(todo, table, model, sampling, options.count))
        return 0
    workspace = Workspace(options.work) if options.work else None
    failed = 0
    cache: dict[int, SharedSampleCache] = {}
    with Watch(len(todo)) as watch:
        for run in todo:
            if run.seed not in cache:  # what was drawn for another seed is of no more use
                cache = {run.seed: SharedSampleCache(model, probe, sampling, workspace, by)}
            watch.name = str(run)
            try:
                made = fitted(model, run, watch)
                if not table.has(keys[run]):
                    row = measured(model, probe, run, made, options.count, cache[run.seed], watch)
                    table.append(row)
                    scores = " ".join(f"{name.upper()} {row[name]:.3f}" for name in ("ua", "ira", "cra", "drift"))
                    watch.say(f"{run}: {scores} in {row['seconds']:.1f} s")
                if attacks:
                    cells = attacked(model, probe, run, made, options.attack, sampling, workspace, watch)
                    table.fill(keys[run], cells)
                    watch.say(f"{run}: came back in {cells['attack_success']:.2f} of the pictures")
            except ForgetConceptError as error:
                failed += 1
                watch.say(f"{run}: {error}", wrong=True)
            watch.done()
        if table.rows:
            named = {concept.name: concept for concept in CONCEPTS}
            notes = {
                kind: asked(model, Run(*kind, named[row["concept"]], int(row["seed"]))).note
                for kind, row in first_of_each_kind(table, model.name).items()
                if kind[0] not in BASELINES
            }
            device = device_name(model.device) if len(todo) > failed else ""
            path = write_summary(table, model.name, BASELINES, notes, device)
            watch.say(f"{len(todo) - failed} runs added; the summary is in {path}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
