"""``forget-concept demo``: forget an object, a style and an identity on the embedded model, and measure it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..request.concept import Concept
from ..request.request import ForgetRequest
from . import options
from .console import Console
from .evaluate import show
from .files import check_folder, make_folder, write_json, write_picture
from .forget import concepts_text, file_stem

if TYPE_CHECKING:
    from ..evaluation import Evaluation

HELP = "forget an object, a style and an identity on the embedded model, and measure it (3 minutes on 2 cores)"
CONCEPTS = (
    Concept("star", "object", "circle"),
    Concept("neon", "style", "sketch"),
    Concept("Lena Frost", "identity", "Nadia Pell"),
)
REPORT, PICTURES, PAGE = "report.json", "before_after.png", "forgetting.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("forget-concept-demo"),
        help="output folder (default: forget-concept-demo)",
    )
    parser.add_argument("--method", default="uce", help="method; see 'forget-concept methods' (default: uce)")
    parser.add_argument("--preset", default="tuned", help="preset of the method: published or tuned (default: tuned)")
    parser.add_argument(
        "--count", type=options.whole(4), default=24, help="pictures in each cell (default: 24; 'evaluate' uses 200)"
    )
    parser.add_argument("--seed", type=options.whole(), default=0, help="seed of the prompts and pictures (default: 0)")
    options.add_sampling(parser, steps=16, guidance=2.5)
    parser.add_argument("--device", help="device, such as cpu or cuda (default: cuda if available)")
    parser.set_defaults(model="mini")


def requests(method: str, preset: str) -> list[ForgetRequest]:
    """The three requests of the demo; each retains all other concepts of its category."""
    from ..mini.vocabulary import CATEGORIES

    return [
        ForgetRequest(
            (concept,),
            preserve=tuple(word.name for word in CATEGORIES[concept.kind] if word.name != concept.name),
            method=method,
            preset=preset,
        )
        for concept in CONCEPTS
    ]


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from ..evaluation import UNEDITED, EvaluationTarget, evaluate
    from ..evaluation.pictures import before_after
    from ..evaluation.report import PatchFacts, Provenance, Report, grids, write_report
    from ..formats import kohya
    from ..methods.fit import fit
    from ..methods.registry import plan_request

    plans = [plan_request(request) for request in requests(args.method, args.preset)]
    check_folder(args.out)
    began = time.perf_counter()
    model, probe = options.load_embedded(args, console)
    folder = make_folder(args.out)
    targets, files = [], []
    for plan in plans:
        with console.progress(f"forgetting {concepts_text(plan.request)}") as progress:
            patch = fit(model, plan, progress)
        file = folder / f"forget-{file_stem(plan.request)}.safetensors"
        kohya.save(patch, file, model.survey)
        files.append(file)
        targets.append(EvaluationTarget(plan.request.concepts[0].name, ((patch, 1.0),)))
    with console.progress("measuring") as progress:
        found = evaluate(
            model,
            probe,
            targets,
            args.count,
            args.seed,
            options.sampling_of(args),
            baselines=(UNEDITED,),
            progress=progress,
        )
    report = {
        "schema": 1,
        "concepts": [entry(one, plan.request, file.name) for one, plan, file in zip(found, plans, files, strict=True)],
    }
    facts = [
        PatchFacts.of(patch, strength, file.name)
        for subject, file in zip(targets, files, strict=True)
        for patch, strength in subject.patches
    ]
    measured = {"count": args.count, "seed": args.seed, "steps": args.steps, "guidance": args.guidance}
    page = Report(
        f"Forgetting {', '.join(one.concept for one in found)}",
        Provenance.of(model, facts, measured),
        tuple(found),
        pictures=tuple(grid for one in found for grid in grids(one)),
    )
    title = f"The same prompts and seeds before and after '{args.method}' ({args.preset})"
    write_picture(folder / PICTURES, before_after(found, title))
    write_json(folder / REPORT, report)
    write_report(page, folder / PAGE)
    show(found, console, f"{args.method} ({args.preset}), {args.count} pictures a cell, {args.steps} steps")
    console.say(f"{folder}: {', '.join(file.name for file in files)}, {PICTURES}, {REPORT}, {PAGE}")
    console.say(f"{time.perf_counter() - began:.0f} s in total")
    return report


def entry(one: Evaluation, request: ForgetRequest, patch: str) -> dict[str, Any]:
    """One concept of ``report.json``: scores as fractions, counts, and the patch file's name in the same folder."""
    scores = one.scores["patched"]
    return {
        "concept": one.concept,
        "category": one.category,
        "method": request.method,
        "preset": request.preset,
        "ua": scores.ua.value,
        "ira": scores.ira.value,
        "cra": scores.cra.value,
        "cra_target": scores.cra_target.value,
        "n_target": one.n_target,
        "n_kept": one.n_kept,
        "patch": patch,
    }
