"""``forget-concept bench``: measure how well a method or a patch forgets each concept of a benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..mini.files import NAMES as EMBEDDED
from ..request.concept import KINDS, canonical_phrase
from ..request.plan import Plan
from ..request.request import ForgetRequest
from . import options
from .console import Console
from .evaluate import VARIANT_TITLES, concepts_of
from .files import check_writable
from .forget import setting

if TYPE_CHECKING:
    from ..evaluation.bench.concept_bench import BenchConcept, ConceptBench
    from ..evaluation.bench.prompt_lists import ListedPrompt
    from ..evaluation.bench.run import BenchRow, Patches
    from ..evaluation.drawing import SamplingSettings
    from ..evaluation.processes import ProcessGroup
    from ..models.latent_diffusion import LatentDiffusion
    from ..patch.patch import Patch
    from ..progress import Progress

HELP = "measure a method or a patch on a whole list of concepts (ConceptBench)"
LEGEND = (
    "Means over the concepts. UA: the judge no longer finds the concept, over all its prompts and by type of prompt.",
    "IRA, CRA: prompts without the concept still show what they name, in its category (near: its neighbours) and in",
    "others. CRA on target: so do the other words of the concept's own prompts. All four are relative to the unedited",
    "model. Drift: how far pictures of the retain set have moved, 0 to 1.",
)
COLUMN_TITLES = {
    "ua": "UA",
    "ua_plain": "plain",
    "ua_compositional": "compos.",
    "ua_paraphrased": "paraphr.",
    "ua_indirect": "indirect",
    "ua_listed": "listed",
    "ira": "IRA",
    "neighbours": "near",
    "cra": "CRA",
    "cra_target": "CRA on target",
    "drift": "drift",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bench",
        action="append",
        metavar="FILE",
        help="a benchmark file, 'embedded' or 'checkpoints'; several are merged (default: chosen by the model)",
    )
    options.add_patches(parser)
    parser.add_argument("--method", help="forget each concept with this method; see 'forget-concept methods'")
    parser.add_argument("--preset", default="tuned", help="preset of the method: published or tuned (default: tuned)")
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="override one setting of the method; VALUE is JSON or plain text",
    )
    parser.add_argument(
        "--concept",
        action="append",
        metavar="NAME",
        help="measure only this concept; repeatable (default: all; with --patch, the concepts that the patch names)",
    )
    parser.add_argument("--category", action="append", choices=KINDS, help="measure only concepts of this category")
    parser.add_argument("--limit", type=options.whole(1), metavar="N", help="measure only the first N concepts")
    parser.add_argument(
        "--prompts",
        action="append",
        metavar="NAME=FILE[#COLUMN]",
        help="additional prompts for the concept NAME, from a .csv, .tsv or .txt list such as I2P or UnlearnDiffAtk "
        "(default column: prompt); sampled with the seeds in the list, at --guidance",
    )
    parser.add_argument("--count", type=options.whole(4), default=24, help="pictures in each cell (default: 24)")
    parser.add_argument("--seed", type=options.whole(), default=0, help="seed of the pictures (default: 0)")
    parser.add_argument(
        "--no-baselines", action="store_true", help="do not measure a negative prompt and safe guidance"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="write results to this .jsonl or .csv file; the same command resumes from it",
    )
    options.add_sampling(parser, steps=16, guidance=None)
    options.add_judge(parser)
    options.add_model(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from ..evaluation.bench.concept_bench import load_bench
    from ..evaluation.bench.questions import bench_questions
    from ..evaluation.bench.results import BenchResults, check_results, mean_scores
    from ..evaluation.bench.run import run_bench
    from ..evaluation.drawing import SampleCache
    from ..evaluation.processes import launched_processes
    from ..evaluation.scores import BASELINES, UNEDITED
    from ..files.workspace import key_of

    # reject invalid input before a model is loaded
    if bool(args.patch) == bool(args.method):
        raise RequestError("Nothing to measure, or two things at once: give either --patch FILE or --method NAME.")
    bench = load_bench(args.bench or ("embedded" if args.model in EMBEDDED else "checkpoints"))
    plans = {one.name: plan_for(one, args) for one in bench.concepts} if args.method else {}
    listed = read_lists(args.prompts or (), bench)
    chosen = choose(bench, args.concept, args.category)
    if args.out is not None:
        check_results(check_writable(args.out))
    options.warn_of_strengths(args.patch, console)
    processes = launched_processes(options.device_of(args))
    try:
        if not processes.is_main:
            console.as_json = False  # only the main process prints the result
        model, evaluators = options.load_evaluators(args, bench, console)
        judge = evaluators.judge
        patches = options.load_patches(args.patch, model)
        without = concepts_of([patch for patch, _ in patches])
        if args.patch and not args.concept:
            chosen = [name for name in chosen if canonical_phrase(name) in map(canonical_phrase, without)]
            if not chosen:
                raise RequestError(
                    f"The benchmark '{bench.name}' contains none of the concepts that the patch names "
                    f"({', '.join(without) or 'none'}): name a concept with --concept, or choose another --bench."
                )
        chosen = chosen[: args.limit]
        for name in chosen:
            bench_questions(bench, judge.names, name, args.count, args.seed, without)  # raises if it cannot be measured
        sampling = processes.broadcast(lambda: sampling_for(args, model))
        settings = {
            "bench": bench.name,
            "bench_digest": bench.digest(),
            "model": model.name,
            "model_hash": model.model_hash,
            "judge": judge.description,
            **measured_settings(args, patches),
            "lists": {name: key_of([[p.text, p.seed] for p in prompts]) for name, prompts in listed.items()},
            "count": args.count,
            "seed": args.seed,
            "steps": sampling.steps,
            "sampler": sampling.sampler,
            "guidance": sampling.guidance,
            "precision": sampling.precision,
        }
        results = processes.broadcast(lambda: BenchResults(args.out, settings))
        known = len(results.rows)

        def patches_of(concept: BenchConcept, progress: Progress) -> Patches:
            return tuple(patches) if args.patch else fit_on_main(model, plans[concept.name], processes, progress)

        with console.progress(f"measuring {len(chosen)} concepts") as progress:
            for row in run_bench(
                judge,
                bench,
                chosen,
                patches_of,
                SampleCache(model, judge, sampling, processes),
                args.count,
                args.seed,
                without=without,
                listed=listed,
                baselines=(UNEDITED,) if args.no_baselines else BASELINES,
                done=results.done,
                progress=progress if processes.is_main else None,
            ):
                if processes.is_main:
                    results.add(row)
                else:
                    results.rows.append(row)
    finally:
        processes.close()
    rows = [row for row in results.rows if row.concept in chosen]
    by_variant = {name: mean_scores([row for row in rows if row.variant == name]) for name in variants_in(rows)}
    if processes.is_main:
        cells = f"{args.count} pictures a cell, {sampling.steps} steps"
        show(rows, f"{bench.name}: {len(chosen)} concepts, {cells}", console)
        if args.out is not None:
            console.say(f"{args.out}: {len(results.rows)} rows, {known} of them from an earlier run")
    return {
        "schema": 1,
        "settings": settings,
        "concepts": len(chosen),
        "means": by_variant,
        "rows": [row.as_dict() for row in rows],
    }


# -- inputs -------------------------------------------------------------------------------------------------------


def plan_for(concept: BenchConcept, args: argparse.Namespace) -> Plan:
    """Plan to forget one concept of a benchmark, with its replacement, and with its neighbours as the retain set.

    Raises:
        RequestError: If the method, its preset or its settings are invalid.
    """
    from ..methods.registry import plan_request

    request = ForgetRequest(
        (concept.concept,),
        preserve=concept.neighbours,
        method=args.method,
        preset=args.preset,
        settings=dict(map(setting, args.set or ())),
        seed=args.seed,
    )
    return plan_request(request)


def read_lists(given: Sequence[str], bench: ConceptBench) -> dict[str, tuple[ListedPrompt, ...]]:
    """Read the prompt lists of ``NAME=FILE[#COLUMN]`` options, by concept.

    Raises:
        RequestError: If an option is malformed, or names an unknown concept.
    """
    from ..evaluation.bench.prompt_lists import read_prompts

    found: dict[str, tuple[ListedPrompt, ...]] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not name.strip() or not path.strip():
            raise RequestError(f"'--prompts {text}' is not of the form NAME=FILE or NAME=FILE#COLUMN.")
        concept = bench.find(name)
        column = ""
        if not Path(path).exists() and "#" in path:
            path, _, column = path.rpartition("#")
        prompts = read_prompts(path, column) if column else read_prompts(path)
        found[concept.name] = (*found.get(concept.name, ()), *prompts)
    return found


def choose(bench: ConceptBench, names: Sequence[str] | None, categories: Sequence[str] | None) -> list[str]:
    """Select the concepts to measure, in the order of the benchmark.

    Raises:
        RequestError: If a name is unknown, or no concept is left.
    """
    wanted = None if not names else {bench.find(name).name for name in names}
    found = [
        one.name
        for one in bench.concepts
        if (wanted is None or one.name in wanted) and (not categories or one.category in categories)
    ]
    if not found:
        raise RequestError(
            f"'{bench.name}' has none of these concepts in the category {' or '.join(categories or ())}: change "
            "--concept or --category."
        )
    return found


# -- settings -----------------------------------------------------------------------------------------------------


def sampling_for(args: argparse.Namespace, model: LatentDiffusion) -> SamplingSettings:
    """Sampling settings; ``auto`` precision is that of earlier results, or measured if there are none."""
    from ..evaluation.bench.results import read_settings

    earlier = read_settings(args.out) if args.out is not None and args.precision == "auto" else None
    if earlier is not None:
        args.precision = earlier.get("precision", "auto")
    return options.sampling_of(args, model).resolved(model)


def measured_settings(args: argparse.Namespace, patches: Sequence[tuple[Patch, float]]) -> dict[str, Any]:
    """The patches or the method, as recorded in the settings of the results."""
    from ..files.workspace import key_of

    if args.method:
        return {"method": args.method, "preset": args.preset, "method_settings": dict(map(setting, args.set or ()))}
    files = [options.split_strength(text)[0] for text in args.patch]
    return {
        "patches": [
            {
                "file": Path(file).name,
                "strength": strength,
                "digest": key_of({key: [factor.up, factor.down] for key, factor in patch.factors.items()}),
            }
            for file, (patch, strength) in zip(files, patches, strict=True)
        ]
    }


def fit_on_main(model: LatentDiffusion, plan: Plan, processes: ProcessGroup, progress: Progress) -> Patches:
    """Fit the plan in the main process and share the patch with the others."""
    from ..methods.fit import fit

    return ((processes.broadcast(lambda: fit(model, plan, progress)), 1.0),)


# -- output -------------------------------------------------------------------------------------------------------


def variants_in(rows: Sequence[BenchRow]) -> list[str]:
    """The distinct variants of the rows, in the order of the table."""
    there = {row.variant for row in rows}
    return [name for name in VARIANT_TITLES if name in there]


def show(rows: Sequence[BenchRow], title: str, console: Console) -> None:
    """Print the means by category and over all, one row per variant, without columns that have no value."""
    from ..evaluation.bench.results import mean_scores

    groups = {kind: [row for row in rows if row.category == kind] for kind in KINDS}
    groups = {kind: found for kind, found in groups.items() if found}
    if len(groups) > 1:
        groups["all"] = list(rows)
    table: list[tuple[str, Mapping[str, float | None]]] = []
    for kind, found in groups.items():
        for variant in variants_in(found):
            some = [row for row in found if row.variant == variant]
            table.append((f"{kind} ({len(some)})\n  {VARIANT_TITLES[variant]}", mean_scores(some)))
    parts = [part for part in COLUMN_TITLES if any(values[part] is not None for _, values in table)]
    cells = [[name, *(_cell(values[part]) for part in parts)] for name, values in table]
    console.table(["", *(COLUMN_TITLES[part] for part in parts)], cells, title)
    for line in LEGEND:
        console.say(line)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
