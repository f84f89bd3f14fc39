"""Every method with its presets on the embedded model, one row per run: `make bench-methods`.

Screening (the default) forgets one concept per category with one seed; `--full` forgets three per category with three
seeds. Both measure 100 pictures in each cell of an evaluation (`n`), and their rows are comparable, because prompts of
the retain set name none of the nine concepts. Rows are appended as runs finish, existing rows are not run again, and
`methods.md` beside the table summarizes them. The presets were tuned on other concepts (tree, mosaic and Hugo Marsh).

Each request has a replacement and preserves the other concepts of its category. Some presets accept no replacement or
no retain set: this is tried first, rejected options are left out, and the summary notes it. A preset that needs
reference images gets eight rendered pictures of the concept. A preset `tuned` has a second row without a replacement.
`none` is the unedited model, `negative_prompt` the unedited model with the concept as its negative prompt,
`safe_guidance` the unedited model with Safe Latent Diffusion's guidance away from the concept (its published medium
configuration), and `retrained` a model that was trained on the same pictures and captions without the first concept of
every category (`mini_retrained/`): it never knew them, and what an attack draws with it is not remembered. A row is
attacked (`core/evaluation/attacks/`) after it is measured, except where UA is below 0.9, because there is nothing to
recover; an existing row that was not attacked yet, or has no held-out wordings, is fitted again for it.

- `ua`, `ira`, `cra`: unlearning accuracy, in-domain and cross-domain retain accuracy (`core/evaluation/scores.py`);
- `drift`: root-mean-square difference of pixels in [0, 1] between the edited and the unedited model's picture for the
  same prompt and seed; mean over the 2n prompts of the retain set;
- `seconds`: wall-clock time of the fit, including its own sampling, with nothing cached;
- `forward_passes`, `backward_passes`: samples in forward and backward passes of the UNet during the fit (a guided
  sampling step of one picture counts as two), without the measurement;
- `peak_bytes`: on CUDA the maximum of torch's allocated memory during the fit, including the model; on a CPU the growth
  of the process' resident set, without the model; empty where neither can be measured;
- `patch_bytes`: size of all factors in fp32;
- `shown_wordings`: share of the `n_wordings` pictures of held-out wordings (`core/evaluation/wordings.py`) that show
  the concept; `shown_unedited`: of the unedited model's; `kept_wordings`: retain accuracy in them, over all others;
- `lowest`, `lowest_kept`, `lowest_wording`: the concept that is kept least over all wordings, its share (of 8 pictures
  or fewer that the unedited model draws right), and the wording in which least of it is kept;
- `ua_0.5`, `ira_0.5`, `ua_0.7`, `ira_0.7`: at a lower strength of the patch;
- `drawn_replacement`, `drawn_nothing`, `drawn_other`: what the concept's own prompts show instead of it;
- `image_named`, `image_empty`: pictures of the concept, noised half way and drawn again with its prompts or an empty
  one, that still show it (n 24);
- `ua_second`: UA by a second classifier of another architecture; `differ_second`: where the two differ;
- `kid_retrained`: kernel distance (KID, the probe's features) of the concept's own prompts' pictures from those of
  `retrained`;
- `attack_...`: share of pictures in which an attack recovers the concept; `attack_success` is the highest of them,
  `attack_budget` the budget of each (`core/evaluation/attacks/budget.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from estimate import dry_run_text
from harness import Cost, RunProgress, SharedSampleCache, Table, costing, device_name
from methods_summary import first_of_each_kind, write_summary
from runs import (
    BASELINES,
    CONCEPTS,
    KEY,
    PRESETS,
    RETRAINED,
    SCREENING,
    Run,
    fullest_request,
    planned,
)
from stress_cells import CELLS, KEPT_CELLS, SETTINGS, filled, stress_cells

from forget_concept.core import mini
from forget_concept.core.errors import ForgetConceptError
from forget_concept.core.evaluation import (
    NEGATIVE,
    PATCHED,
    SAFE,
    UNEDITED,
    EvaluationTarget,
    SamplingSettings,
    Variant,
)
from forget_concept.core.evaluation.attacks import ATTACKS, BUDGETS, ProbeJudge, Target, run_attacks
from forget_concept.core.evaluation.judges import WorldJudge
from forget_concept.core.evaluation.scores import EvaluationPlan, score_plan, world_plans
from forget_concept.core.evaluation.stress import StressSettings
from forget_concept.core.files.workspace import Workspace
from forget_concept.core.methods.fit import fit
from forget_concept.core.methods.registry import all_methods, plan_request
from forget_concept.core.mini.second_probe import load_second_probe
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.models.safe_guidance import SafetyGuidance
from forget_concept.core.patch.patch import Patch
from forget_concept.core.progress import Progress

RETRAINED_MODEL = Path(__file__).with_name("mini_retrained")
# below this UA there is nothing to recover
FORGOTTEN = 0.9
ATTACKED = ("attack_budget", "attack_success", *(f"attack_{name}" for name in ATTACKS))
COLUMNS = [
    *("model", "method", "preset", "gradient", "category", "concept", "replacement", "seed", "ua", "ira", "cra", "n"),
    *("drift", "seconds", "forward_passes", "backward_passes", "peak_bytes", "patch_bytes"),
    *CELLS,
    *ATTACKED,
]
COUNT, SEEDS = 100, (0, 1, 2)


# -- one run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """The result of a run's fit: the variant to measure, its patches, and the cost."""

    variant: str
    patches: tuple[tuple[Patch, float], ...]
    cost: Cost
    model: LatentDiffusion | None = None

    def variant_of(self, concept: str) -> Variant:
        """The variant of the model to measure."""
        safe = SafetyGuidance(concept) if self.variant == SAFE else None
        return Variant(self.patches, concept if self.variant == NEGATIVE else "", safe, self.model)


def fitted(model: LatentDiffusion, run: Run, progress: Progress | None) -> Fitted:
    """Fit a run's method.

    Raises:
        ForgetConceptError: If the method rejects the request, or fails.
    """
    if run.method == RETRAINED:
        return Fitted(RETRAINED, (), Cost(), retrained_model(str(model.device)))
    if not run.forgets:
        return Fitted(run.method if run.method in (NEGATIVE, SAFE) else PATCHED, (), Cost())
    wanted = fullest_request(model, run)
    with costing(model) as cost:
        patch: Patch = fit(model, plan_request(wanted.request), progress, wanted.inputs)
    return Fitted(PATCHED, ((patch, 1.0),), cost)


@cache
def retrained_model(device: str) -> LatentDiffusion:
    """The model that never knew the concepts of :data:`SCREENING`."""
    return mini.load(device, RETRAINED_MODEL)


def plan_of(run: Run, made: Fitted, count: int) -> EvaluationPlan:
    """The questions about a run's concept, and its variant as :data:`PATCHED`."""
    without = [concept.name for concept in CONCEPTS]
    (plan,) = world_plans([EvaluationTarget(run.concept.name, ())], count, run.seed, without=without, baselines=())
    return dataclasses.replace(plan, variants={UNEDITED: Variant(), PATCHED: made.variant_of(run.concept.name)})


def measured(
    model: LatentDiffusion,
    run: Run,
    made: Fitted,
    plan: EvaluationPlan,
    cache: SharedSampleCache,
    progress: Progress | None,
) -> dict[str, Any]:
    """Measure a run; returns its row, without held-out wordings and attacks."""
    cost = made.cost
    plan.request(cache)
    cache.generate(progress)
    found = score_plan(cache, plan, (UNEDITED,))
    scores = found.scores[PATCHED]
    return run.key(model.name, len(plan.cells.target)) | {
        "ua": scores.ua.value,
        "ira": scores.ira.value,
        "cra": scores.cra.value,
        "drift": found.drift[PATCHED],
        "seconds": cost.seconds,
        "forward_passes": cost.forward,
        "backward_passes": cost.backward,
        "peak_bytes": cost.peak,
        "patch_bytes": made.patches[0][0].nbytes if made.patches else 0,
        **dict.fromkeys(CELLS),
        **dict.fromkeys(ATTACKED),
    }


def stressed(
    model: LatentDiffusion,
    probe: Any,
    run: Run,
    made: Fitted,
    plan: EvaluationPlan,
    cache: SharedSampleCache,
    settings: StressSettings,
    progress: Progress | None,
) -> dict[str, Any]:
    """Measure a run's cells of :data:`CELLS`."""
    plan.request(cache)
    cache.generate(progress)
    with_model = RETRAINED_MODEL.is_dir() and run.concept in SCREENING and run.key("", 0)["replacement"] == ""
    concept = run.concept if run.replaced and run.forgets else dataclasses.replace(run.concept, replacement=None)
    cells = stress_cells(
        cache,
        plan,
        made.patches,
        concept,
        WorldJudge(probe),
        load_second_probe(),
        Variant(model=retrained_model(str(model.device))) if with_model else None,
        settings,
        progress,
    )
    # it lacks two of the concepts that the others keep
    return cells | (dict.fromkeys(KEPT_CELLS) if run.method == RETRAINED else {})


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
    """Attack a run; returns the row's attack cells, empty for attacks that this model does not support."""
    name = run.concept.name
    variant = made.variant_of(name)
    found = run_attacks(
        made.model or model,
        dataclasses.replace(variant, model=None),
        Target.embedded(name),
        ProbeJudge(probe, name),
        budget,
        run.seed,
        before=False,
        base=model,
        sampling=sampling,
        workspace=workspace,
        progress=progress,
    )
    cells = {f"attack_{one.attack}": one.after.value for one in found.results}
    return dict.fromkeys(ATTACKED) | cells | {"attack_budget": budget, "attack_success": found.attack_success.value}


# -- the command --------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Run every method on the embedded model, and tabulate the results.")
    p.add_argument("--full", action="store_true", help="three concepts per category and three seeds, not one and one")
    p.add_argument("--method", action="append", help="only this method; repeatable (default: all, and the baselines)")
    p.add_argument("--preset", action="append", help=f"only this preset (default: {' and '.join(PRESETS)})")
    p.add_argument("--gradient", action="append", help="gradient rule of trained methods (default: the preset's)")
    p.add_argument("--concept", action="append", choices=[c.name for c in CONCEPTS], help="only this; repeatable")
    p.add_argument("--count", type=int, default=COUNT, help="pictures in each cell of an evaluation (default: 100)")
    p.add_argument("--seed", type=int, action="append", help="seed of fits and pictures (default: 0; full: 0 1 2)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--steps", type=int, default=SamplingSettings.steps, help="sampling steps while measuring")
    p.add_argument("--batch", type=int, default=SamplingSettings.batch, help="pictures per batch while measuring")
    p.add_argument("--precision", default=SamplingSettings.precision, help="while measuring: auto, float32 or bfloat16")
    p.add_argument("--out", type=Path, default=Path(__file__).with_name("methods.csv"))
    p.add_argument(
        "--attack", choices=(*BUDGETS, "none"), default="quick", help="budget of the attacks (default: quick)"
    )
    p.add_argument(
        "--no-stress", action="store_true", help="leave out held-out wordings, lower strengths and a second classifier"
    )
    p.add_argument("--work", type=Path, help="folder to cache pictures of the unedited model and of the attacks")
    p.add_argument("--dry-run", action="store_true", help="print what would run, and an estimate of the time")
    return p


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def embedded(device: str) -> tuple[LatentDiffusion, Any, str]:
    """Load the embedded model and its probe on a device; returns them and a hash of the probe's weights."""
    probe = mini.load_probe().to(device)
    return mini.load(device), probe, _file_hash(mini.weights_folder() / "probe.safetensors")


def main(argv: Sequence[str] | None = None, load: Any = embedded) -> int:
    """Run the benchmark; returns 0, 1 if a run failed (the others still run), or 2 if nothing could run."""
    options = parser().parse_args(argv)
    try:
        return _main(options, load)
    except ForgetConceptError as error:
        print(error, file=sys.stderr)
        return 2


def left_to_do(table: Table, key: dict[str, Any], attacks: bool, stress: bool) -> tuple[bool, bool, bool]:
    """Whether a row is to be measured, its cells of :data:`CELLS` are, and it is to be attacked."""
    if not table.has(key):
        return True, stress, attacks
    row = table.row(key)
    known = key["method"] in BASELINES or float(row["ua"]) >= FORGOTTEN
    return False, stress and not filled(row), attacks and known and not row["attack_budget"]


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
    todo = [run for run in runs if any(left_to_do(table, keys[run], attacks, not options.no_stress))]
    sampling = SamplingSettings(options.steps, batch=options.batch, precision=options.precision)
    if options.dry_run:
        print(dry_run_text(todo, table, model, sampling, options.count, not options.no_stress))
        return 0
    workspace = Workspace(options.work) if options.work else None
    failed = 0
    caches: dict[int, SharedSampleCache] = {}
    with RunProgress(len(todo)) as run_progress:
        for run in todo:
            if run.seed not in caches:  # runs of other seeds share no pictures
                caches = {run.seed: SharedSampleCache(model, probe, sampling, workspace, by)}
            run_progress.name = str(run)
            try:
                made = fitted(model, run, run_progress)
                plan = plan_of(run, made, options.count)
                if not table.has(keys[run]):
                    row = measured(model, run, made, plan, caches[run.seed], run_progress)
                    table.append(row)
                    scores = " ".join(f"{name.upper()} {row[name]:.3f}" for name in ("ua", "ira", "cra", "drift"))
                    run_progress.say(f"{run}: {scores} in {row['seconds']:.1f} s")
                _, stress, attack = left_to_do(table, keys[run], attacks, not options.no_stress)
                if stress:
                    settings = dataclasses.replace(SETTINGS, target=min(SETTINGS.target, options.count))
                    cells = stressed(model, probe, run, made, plan, caches[run.seed], settings, run_progress)
                    table.fill(keys[run], cells)
                    run_progress.say(f"{run}: shown in {cells['shown_wordings']:.2f} of other wordings")
                caches[run.seed].release()
                if attack:
                    cells = attacked(model, probe, run, made, options.attack, sampling, workspace, run_progress)
                    table.fill(keys[run], cells)
                    run_progress.say(f"{run}: recovered in {cells['attack_success']:.2f} of the pictures")
            except ForgetConceptError as error:
                failed += 1
                run_progress.say(f"{run}: {error}", wrong=True)
            run_progress.done()
        if table.rows:
            named = {concept.name: concept for concept in CONCEPTS}
            notes = {
                kind: fullest_request(model, Run(*kind, named[row["concept"]], int(row["seed"]))).note
                for kind, row in first_of_each_kind(table, model.name).items()
                if kind[0] not in BASELINES
            }
            device = device_name(model.device) if len(todo) > failed else ""
            path = write_summary(table, model.name, BASELINES, notes, device)
            run_progress.say(f"{len(todo) - failed} runs completed; the summary is in {path}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
