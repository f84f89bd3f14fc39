"""What runs of `methods.py` will cost: the text of its `--dry-run`."""

from __future__ import annotations

from collections.abc import Sequence

from harness import Table, costing, device_name
from runs import NOTHING, Run
from stress_cells import SETTINGS

from forget_concept.core.evaluation import SamplingSettings
from forget_concept.core.evaluation.wordings import WORDINGS
from forget_concept.core.methods.registry import get
from forget_concept.core.mini.vocabulary import CATEGORIES
from forget_concept.core.models.latent_diffusion import LatentDiffusion
from forget_concept.core.request.settings import resolve_settings

# rough cost of training, in UNet passes per step and row of the batch (forward, backward and the retain set)
PASSES_PER_ROW = 6


def pictures_to_draw(runs: Sequence[Run], count: int, stress: bool = False) -> int:
    """Number of pictures to measure: three cells per run, and the unedited model's, which all runs of a seed share.

    With ``stress`` those of :data:`CELLS` too, of runs that are measured whole.
    """
    shared = {(run.seed, run.concept.name) for run in runs}
    plain = len(shared) * count + len({seed for seed, _ in shared}) * 3 * count
    whole = plain + sum(3 * count for run in runs if run.method != NOTHING)
    if not stress:
        return whole
    others = sum(map(len, CATEGORIES.values())) - 1
    wordings = len(WORDINGS) * (min(SETTINGS.target, count) + SETTINGS.kept * others)
    weaker = sum(2 * count * len(SETTINGS.strengths) for run in runs if run.forgets)
    edited = sum(run.method != NOTHING for run in runs)
    return whole + (len(shared) + edited) * (wordings + 2 * SETTINGS.continued) + weaker


def fit_passes(run: Run) -> int:
    """Rough estimate of the UNet passes of a fit, from its settings; correct within a small factor."""
    if not run.forgets:
        return 0
    settings = resolve_settings(get(run.method), run.preset, {"gradient": run.gradient} if run.gradient else {})

    def sized(name: str, default: int = 0) -> int:
        return getattr(settings, name, default)

    drawn = 2 * sized("sample_steps") * (2 * sized("n_images") + sized("replay_images"))
    importance = 3 * 2 * sized("fisher_draws") * sized("fisher_samples")
    return PASSES_PER_ROW * sized("steps") * sized("batch_size", 1) + drawn + importance


def seconds_per_pass(model: LatentDiffusion, sampling: SamplingSettings) -> float:
    """Seconds per sample of a UNet forward pass, measured in a batch of the evaluation's size."""
    batch = sampling.batch
    with costing(model) as cost:
        model.sample([""] * batch, range(batch), steps=2, guidance=sampling.guidance, batch=batch)
    return cost.seconds / cost.forward


def dry_run_text(
    runs: Sequence[Run], table: Table, model: LatentDiffusion, sampling: SamplingSettings, count: int, stress: bool
) -> str:
    """Describe the runs, one line each, and estimate the total time on this machine, without attacks."""
    one = seconds_per_pass(model, sampling)
    known: dict[tuple[str, str, str], list[float]] = {}
    for row in table.rows:
        known.setdefault((row["method"], row["preset"], row["gradient"]), []).append(float(row["seconds"]))
    lines, total = [], 0.0
    for run in runs:
        before = known.get((run.method, run.preset, run.gradient))
        fitting = sum(before) / len(before) if before else fit_passes(run) * one
        total += fitting
        lines.append(f"{run}: about {fitting:.0f} s to fit" if run.forgets else f"{run}: nothing to fit")
    drawn = pictures_to_draw([run for run in runs if not table.has(run.key(model.name, count))], count, stress)
    drawing = drawn * 2 * sampling.steps * one
    lines.append(
        f"{len(runs)} runs: about {total / 60:.0f} min to fit, and {drawn} pictures to measure, about "
        f"{drawing / 60:.0f} min, on {device_name(model.device)}."
    )
    return "\n".join(lines)
