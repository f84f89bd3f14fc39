"""``forget-concept evaluate``: what a patch forgot and what it kept, beside its baselines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from . import options
from .console import Console
from .files import check_writable, write_json, write_picture

if TYPE_CHECKING:
    from ..evaluation import Evaluation, Score
    from ..evaluation.report import Report
    from ..patch.patch import Patch

HELP = "measure what a patch forgot, what it kept and whether it comes back"
EXPLAINED = (
    "Fractions, n and 95 % intervals. UA: the probe no longer finds the concept in prompts that name it.",
    "IRA, CRA: prompts without it still show what they name, of the same category and of other ones;",
    "CRA on target: so does what else its own prompts name. These three as shares of the unedited model's.",
)
SPOKEN = {
    "patched": "patched",
    "unedited": "unedited model",
    "negative_prompt": "negative prompt",
    "safe_guidance": "safe guidance",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_patches(parser, required=True)
    parser.add_argument(
        "--concept", action="append", metavar="NAME", help="what to measure (default: the concepts the patches name)"
    )
    parser.add_argument("--count", type=options.whole(4), default=200, help="pictures in each cell (default: 200)")
    parser.add_argument("--seed", type=options.whole(), default=0, help="of the prompts and pictures (default: 0)")
    parser.add_argument(
        "--no-baselines", action="store_true", help="leave out the negative prompt and the safe guidance"
    )
    parser.add_argument(
        "--attack",
        choices=("quick", "standard"),
        help="also try to bring the concept back: paraphrases, other spellings, found words, learned vectors",
    )
    parser.add_argument(
        "--m-score", action="store_true", help="also Forget-Me-Not's M-Score, by textual inversion before and after"
    )
    parser.add_argument(
        "--earlier",
        action="append",
        default=[],
        metavar="FILE",
        help="patches of earlier steps of the same sequence, the first step first: what each request cost",
    )
    parser.add_argument(
        "--bench",
        action="append",
        metavar="FILE",
        help="ask a benchmark's prompts: a file, 'embedded' or 'checkpoints' (default: the embedded model's own world; "
        "'checkpoints' for any other model)",
    )
    parser.add_argument(
        "--report", metavar="FILE.html", type=Path, help="write everything as one page, and its figures beside it"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the figures as JSON")
    parser.add_argument("--pictures", metavar="FILE.png", type=Path, help="also write pictures before and after")
    parser.add_argument(
        "--work", metavar="DIR", type=Path, help="a folder that keeps what takes long, to go on where it was cut short"
    )
    options.add_sampling(parser, steps=16, guidance=None)
    options.add_judge(parser)
    options.add_model(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from ..evaluation import known_concept
    from ..evaluation.assess import Measures, assess
    from ..evaluation.bench.concept_bench import load_bench
    from ..evaluation.pictures import before_after
    from ..evaluation.report import write_report
    from ..evaluation.scores import BASELINES, UNEDITED
    from ..files.workspace import Workspace

    bench = None
    if args.bench or args.model != "mini":
        bench = load_bench(args.bench or "checkpoints")
    for name in args.concept or ():
        known_concept(name) if bench is None else bench.find(name)
    for file in (args.out, args.pictures, args.report):
        if file is not None:
            check_writable(file)
    if args.pictures is not None and args.pictures.suffix.lower() != ".png":
        raise RequestError(f"'{args.pictures}' cannot be written: pictures are .png files.")
    if args.report is not None and args.report.suffix.lower() not in (".html", ".htm"):
        raise RequestError(f"'{args.report}' cannot be written: a report is an .html file.")
    model, evaluators = options.load_evaluators(args, bench, console, quality=args.report is not None)
    patches = options.load_patches(args.patch, model)
    earlier = [patch for patch, _ in options.load_patches(args.earlier, model)]
    forgotten = concepts_of([patch for patch, _ in patches])
    names = args.concept or forgotten
    if not names:
        raise RequestError("The patch does not say what it forgets: name it with --concept.")
    measures = Measures(
        args.count,
        args.seed,
        (UNEDITED,) if args.no_baselines else BASELINES,
        options.sampling_of(args, model),
        quality=args.report is not None,
        drift=args.report is not None,
        attention=args.report is not None,
        m_score=args.m_score,
        attacks=args.attack,
    )
    with console.progress("measuring") as progress:
        report = assess(
            model,
            evaluators,
            patches,
            names,
            measures,
            bench=bench,
            earlier=earlier,
            # another concept that the same patches forget is not to be kept either
            without=forgotten if bench is not None else [name for name in forgotten if _is_known(name)],
            files=[Path(options.split_strength(text)[0]).name for text in args.patch],
            progress=progress,
            workspace=None if args.work is None else Workspace(args.work),
        )
    found = report.evaluations
    show(found, console)
    _show_more(report, console)
    data = {
        "schema": 1,
        "model": model.name,
        "patches": [dict(zip(("file", "strength"), options.split_strength(text), strict=True)) for text in args.patch],
        "count": args.count,
        "seed": args.seed,
        "steps": args.steps,
        "guidance": measures.sampling.guidance,
        "concepts": [one.as_dict() for one in found],
    }
    for part in ("attacks", "m_scores", "erosion"):
        if several := getattr(report, part):
            data[part] = [one.as_dict() for one in several]
    if report.left_out:
        data["left_out"] = dict(report.left_out)
    if args.pictures is not None:
        write_picture(args.pictures, before_after(found, "Before and after"))
    if args.report is not None:
        data["report"] = str(write_report(report, args.report))
        console.say(f"{data['report']}: the report")
    if args.out is not None:
        write_json(args.out, data)
    return data


def _show_more(report: Report, console: Console) -> None:
    """Attacks, M-Scores and erosion, as far as they were asked for, and what could not be had."""
    if report.attacks:
        rows = [
            [f"{one.name}, {one.concept}", "–" if one.before is None else cell(one.before), cell(one.after), one.budget]
            for one in report.attacks
        ]
        console.table(["attack", "before", "after", "budget"], rows)
        console.say("Shares of pictures that show the concept again, from the strongest prompts of each attack.")
    if report.m_scores:
        rows = [[one.concept, f"{one.before:.3f}", f"{one.after:.3f}"] for one in report.m_scores]
        console.table(["M-Score", "before", "after"], rows)
        console.say("Cosine of what textual inversion finds in pictures of the concept to the concept's own words.")
    if report.erosion:
        rows = [[f"{one.step}: {one.concept}", cell(one.kept)] for one in report.erosion]
        console.table(["after request", "kept"], rows)
    for part, why in report.left_out.items():
        console.note(f"left out: {report.PARTS.get(part, part)}: {why}")


def concepts_of(patches: Sequence[Patch]) -> list[str]:
    """The concepts that the patches' metadata name, each once."""
    return list(dict.fromkeys(name for patch in patches for name in patch.about.concepts or ()))


def _is_known(name: str) -> bool:
    from ..evaluation import known_concept

    try:
        known_concept(name)
    except RequestError:
        return False
    return True


def show(found: Sequence[Evaluation], console: Console, title: str | None = None) -> None:
    """The figures as a table: for each concept a row a variant, every share with its n and its interval below."""
    rows = []
    for one in found:
        for variant, scores in one.scores.items():
            cells = [cell(score) for score in (scores.ua, scores.ira, scores.cra, scores.cra_target)]
            rows.append([f"{one.concept}, {one.category}\n  {SPOKEN[variant]}", *cells])
    console.table(["", "UA", "IRA", "CRA", "CRA on target"], rows, title)
    for line in EXPLAINED:
        console.say(line)


def cell(score: Score) -> str:
    """The value and its n, the interval below."""
    return f"{score.value:.2f}  n {score.n}\n{score.low:.2f} – {score.high:.2f}"
