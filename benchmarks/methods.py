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
under Safe Latent Diffusion's guidance away from the concept (its published medium configuration).

- `ua`, `ira`, `cra`: unlearning accuracy, in-domain and cross-domain retain accuracy (`core/evaluation/scores.py`);
- `drift`: root-mean-square difference of pixels in [0, 1] between the edited and the unedited model's picture of the
  same kept prompt and seed, the mean over the 2n kept prompts;
- `seconds`: wall clock of the fit alone, with all that it draws and trains, nothing taken from an earlier run;
- `forward_passes`, `backward_passes`: pictures that went through the UNet in the fit, and gradients that came back
  through it (a guided step of one picture is two passes); measuring is not in them;
- `peak_bytes`: on CUDA the most that torch had allocated during the fit, the model included; on a CPU the growth of the
  process' resident set over what it was before, the model not included; empty where neither can be known;
- `patch_bytes`: of all factors in fp32.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Cost, SharedDrawings, Table, Watch, costing, device_name, mean_interval

from forget_concept.core import mini
from forget_concept.core.concepts import Concept, ForgetRequest
from forget_concept.core.diffusion import LatentDiffusion
from forget_concept.core.errors import Cancelled, ForgetConceptError, RequestError
from forget_concept.core.evaluation import NEGATIVE, PATCHED, SAFE, UNEDITED, Sampling, Subject, evaluate
from forget_concept.core.methods import Inputs, all_methods, fit, get, resolve_settings
from forget_concept.core.mini import world
from forget_concept.core.mini.vocabulary import CATEGORIES, NONE
from forget_concept.core.patch import Patch
from forget_concept.core.progress import Progress, ProgressEvent
from forget_concept.core.workspace import Workspace

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
KEY = ["model", "method", "preset", "gradient", "category", "concept", "seed", "n"]
COLUMNS = [
    *("model", "method", "preset", "gradient", "category", "concept", "seed", "ua", "ira", "cra", "n", "drift"),
    *("seconds", "forward_passes", "backward_passes", "peak_bytes", "patch_bytes"),
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
class Asked:
    """A request that a method takes, what goes with it, and what had to be left out or added, in words."""

    request: ForgetRequest
    inputs: Inputs
    note: str


def asked(model: LatentDiffusion, run: Run, preserve: Sequence[str] | None = None) -> Asked:
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
                fit(model, found.request, _stop, found.inputs)
            except RequestError as error:
                first = first or error
                continue
            except Cancelled:
                pass
            return found
    assert first is not None
    raise first


def _asked(run: Run, replaced: bool, preserved: bool, images: bool, preserve: Sequence[str] | None) -> Asked:
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
    return Asked(request, inputs, "; ".join(filter(None, (note, f"with {IMAGES} pictures" if images else ""))))


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


def measured(
    model: LatentDiffusion, probe: Any, run: Run, count: int, drawings: SharedDrawings, progress: Progress | None
) -> dict[str, Any]:
    """Run it: the row. Raises :class:`ForgetConceptError` where the method refuses or fails."""
    cost, patches = Cost(), ()
    variant = run.method if run.method in (NEGATIVE, SAFE) else PATCHED
    if run.forgets:
        wanted = asked(model, run)
        with costing(model) as cost:
            patch: Patch = fit(model, wanted.request, progress, wanted.inputs)
        patches = ((patch, 1.0),)
    (found,) = evaluate(
        model,
        probe,
        [Subject(run.concept.name, patches)],
        count,
        run.seed,
        without=[concept.name for concept in CONCEPTS],
        baselines=(UNEDITED,) if variant == PATCHED else (UNEDITED, variant),
        progress=progress,
        drawings=drawings,
    )
    drawings.release()
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
        "patch_bytes": patches[0][0].nbytes if patches else 0,
    }


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


def seconds_a_pass(model: LatentDiffusion, sampling: Sampling) -> float:
    """Of one picture through the UNet without gradient, in a batch as in an evaluation."""
    batch = sampling.batch
    with costing(model) as cost:
        model.sample([""] * batch, range(batch), steps=2, guidance=sampling.guidance, batch=batch)
    return cost.seconds / cost.forward


def told(runs: Sequence[Run], table: Table, model: LatentDiffusion, sampling: Sampling, count: int) -> str:
    """What is to do, in words: a line a run, and how long all of it may take here."""
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
    drawn = pictures_to_draw(runs, count)
    drawing = drawn * 2 * sampling.steps * one
    lines.append(
        f"{len(runs)} runs: about {total / 60:.0f} min of fitting, and {drawn} pictures to measure with, about "
        f"{drawing / 60:.0f} min, on {device_name(model.device)}."
    )
    return "\n".join(lines)


# -- the summary --------------------------------------------------------------------------------------------------


def summary(rows: Iterable[Mapping[str, str]], notes: Mapping[tuple[str, str, str], str], devices: str) -> str:
    """The table in Markdown: a section a category, a line for each method, preset and rule, over concepts and seeds."""
    rows = list(rows)
    lines = [
        "# Every method on the embedded model",
        "",
        "Written by `make bench-methods` from `methods.csv`; what the columns mean is said in `methods.py`.",
        f"Seconds and bytes measured on: {devices}",
        "",
        "Means over concepts and seeds with 95 % intervals, in percent: Wilson's over all pictures (ratios above 100 %",
        "count as 100), widened to Student's over the runs where there are several. `n`: runs × pictures in a cell.",
    ]
    for category in CATEGORIES:
        here = [row for row in rows if row["category"] == category]
        if not here:
            continue
        names = ", ".join(dict.fromkeys(row["concept"] for row in here))
        lines += [
            "",
            f"## {category.capitalize()}: {names}",
            "",
            "| method | preset | gradient | n | UA | IRA | CRA | drift | seconds | forward | backward | peak | patch |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        groups: dict[tuple[str, str, str, str], list[Mapping[str, str]]] = {}
        for row in here:
            groups.setdefault((row["method"], row["preset"], row["gradient"], row["n"]), []).append(row)
        for (method, preset, gradient, n), several in sorted(groups.items(), key=lambda item: _order(item[0])):
            cells = [f"{method}{' *' if notes.get((method, preset, gradient)) else ''}", preset, gradient]
            cells.append(f"{len(several)} × {n}")
            for score in ("ua", "ira", "cra"):
                cells.append("{:.1f} ({:.1f}–{:.1f})".format(*(100 * v for v in _interval(several, score, int(n)))))
            cells.append(f"{_mean(several, 'drift'):.3f}")
            cells.append(f"{_mean(several, 'seconds'):.2f}" if method not in BASELINES else "")
            for name in ("forward_passes", "backward_passes"):
                cells.append(f"{_mean(several, name):.0f}" if method not in BASELINES else "")
            for name in ("peak_bytes", "patch_bytes"):
                known = method not in BASELINES and all(row[name] for row in several)
                cells.append(_bytes(_mean(several, name)) if known else "")
            lines.append(f"| {' | '.join(cells)} |")
    said = [
        f"`{' '.join(filter(None, kind))}`: {note}." for kind, note in sorted(notes.items()) if note and _in(kind, rows)
    ]
    if said:
        lines += ["", "\\* asked for what it takes:", *(f"- {line}" for line in said)]
    return "\n".join(lines) + "\n"


def _order(kind: tuple[str, ...]) -> tuple[object, ...]:
    return (kind[0] not in BASELINES, kind[0] != NOTHING, *kind)


def _in(kind: tuple[str, str, str], rows: Iterable[Mapping[str, str]]) -> bool:
    return any((row["method"], row["preset"], row["gradient"]) == kind for row in rows)


def _interval(rows: Sequence[Mapping[str, str]], score: str, n: int) -> tuple[float, float, float]:
    return mean_interval([float(row[score]) for row in rows], n)


def _mean(rows: Sequence[Mapping[str, str]], name: str) -> float:
    return sum(float(row[name]) for row in rows) / len(rows)


def _bytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e3:.0f} kB"


DEVICES = "Seconds and bytes measured on: "


def write_summary(table: Table, model: LatentDiffusion, added: bool) -> Path:
    """``<table>.md`` beside the table; devices of earlier runs stay named in it."""
    path = table.path.with_suffix(".md")
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    before = next((line.removeprefix(DEVICES) for line in old if line.startswith(DEVICES)), "")
    devices = dict.fromkeys(filter(None, before.split("; ")))
    if added or not devices:
        devices[device_name(model.device)] = None
    rows = [row for row in table.rows if row["model"] == model.name]
    notes = {}
    for row in rows:
        kind = row["method"], row["preset"], row["gradient"]
        if kind not in notes and kind[0] not in BASELINES:
            concept = next(c for c in CONCEPTS if c.name == row["concept"])
            notes[kind] = asked(model, Run(*kind, concept, int(row["seed"]))).note
    path.write_text(summary(rows, notes, "; ".join(devices)), encoding="utf-8")
    return path


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
    p.add_argument("--steps", type=int, default=Sampling.steps, help="sampling steps while measuring")
    p.add_argument("--batch", type=int, default=Sampling.batch, help="pictures drawn at a time while measuring")
    p.add_argument("--precision", default=Sampling.precision, help="while measuring: auto, float32 or bfloat16")
    p.add_argument("--out", type=Path, default=Path(__file__).with_name("methods.csv"))
    p.add_argument("--work", type=Path, help="a folder that keeps the unedited model's pictures for later runs")
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
    todo = [run for run in runs if not table.has(run.key(model.name, options.count))]
    sampling = Sampling(options.steps, batch=options.batch, precision=options.precision)
    if options.dry_run:
        print(told(todo, table, model, sampling, options.count))
        return 0
    workspace = Workspace(options.work) if options.work else None
    failed = 0
    drawings: dict[int, SharedDrawings] = {}
    with Watch(len(todo)) as watch:
        for run in todo:
            if run.seed not in drawings:  # what was drawn for another seed is of no more use
                drawings = {run.seed: SharedDrawings(model, probe, sampling, workspace, by)}
            watch.name = str(run)
            try:
                row = measured(model, probe, run, options.count, drawings[run.seed], watch)
            except ForgetConceptError as error:
                failed += 1
                watch.say(f"{run}: {error}", wrong=True)
            else:
                table.append(row)
                scores = " ".join(f"{name.upper()} {row[name]:.3f}" for name in ("ua", "ira", "cra", "drift"))
                watch.say(f"{run}: {scores} in {row['seconds']:.1f} s")
            watch.done()
        if table.rows:
            path = write_summary(table, model, len(todo) > failed)
            watch.say(f"{len(todo) - failed} runs added; the summary is in {path}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
