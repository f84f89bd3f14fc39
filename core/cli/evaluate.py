"""``forget-concept evaluate``: measure what a patch forgot and what it retained, against baselines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..mini.files import NAMES as EMBEDDED
from . import options
from .console import Console
from .files import check_distinct, check_writable, write_json, write_picture

if TYPE_CHECKING:
    from ..evaluation import Evaluation, Score
    from ..evaluation.report import Report
    from ..patch.patch import Patch

HELP = "measure what a patch forgot, what it retained, and whether the concept can be recovered"
LEGEND = (
    "Fractions, n and 95 % intervals. UA: the probe no longer finds the concept in prompts that name it.",
    "IRA, CRA: prompts without the concept still show what they name, in the same category and in others.",
    "CRA on target: so do the other words of the concept's own prompts. All three are relative to the unedited model.",
)
_FULL_PARTS = ("wordings", "strengths", "image_to_image")
VARIANT_TITLES = {
    "patched": "patched",
    "unedited": "unedited model",
    "negative_prompt": "negative prompt",
    "safe_guidance": "safe guidance",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_patches(parser, required=True)
    parser.add_argument(
        "--concept",
        action="append",
        metavar="NAME",
        help="concept to measure; repeatable (default: the concepts that the patches name)",
    )
    parser.add_argument("--count", type=options.whole(4), default=200, help="pictures in each cell (default: 200)")
    parser.add_argument(
        "--full",
        action="store_true",
        help="also measure wordings that no fit uses, every kept concept by itself, lower strengths, and pictures that "
        "start from the concept: several times as many pictures",
    )
    parser.add_argument("--seed", type=options.whole(), default=0, help="seed of the prompts and pictures (default: 0)")
    parser.add_argument(
        "--no-baselines", action="store_true", help="do not measure a negative prompt and safe guidance"
    )
    parser.add_argument(
        "--attack",
        choices=("quick", "standard"),
        help="also try to recover the concept: paraphrases, other spellings, searched tokens, learned embeddings",
    )
    parser.add_argument(
        "--m-score",
        action="store_true",
        help="also compute Forget-Me-Not's M-Score, by textual inversion before and after",
    )
    parser.add_argument(
        "--earlier",
        action="append",
        default=[],
        metavar="FILE",
        help="patch of an earlier step of the same sequence, repeatable, in order: shows what each request eroded",
    )
    parser.add_argument(
        "--bench",
        action="append",
        metavar="FILE",
        help="use the prompts of a benchmark: a file, 'embedded' or 'checkpoints' (default: the embedded model's own "
        "vocabulary; 'checkpoints' for any other model)",
    )
    parser.add_argument(
        "--report",
        metavar="FILE.html",
        type=Path,
        help="write a report as one HTML page, with its figures as JSON beside it",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the figures as JSON")
    parser.add_argument("--pictures", metavar="FILE.png", type=Path, help="also write pictures from before and after")
    parser.add_argument(
        "--work",
        metavar="DIR",
        type=Path,
        help="cache intermediate results in this folder; the same command resumes from it",
    )
    options.add_sampling(parser, steps=16, guidance=None)
    options.add_judge(parser)
    options.add_model(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from ..evaluation import find_concept
    from ..evaluation.assess import EvaluationSettings, assess
    from ..evaluation.bench.concept_bench import load_bench
    from ..evaluation.pictures import before_after
    from ..evaluation.report import write_report
    from ..evaluation.scores import BASELINES, UNEDITED
    from ..evaluation.stress import FULL
    from ..files.workspace import Workspace

    bench = None
    if args.bench or args.model not in EMBEDDED:
        bench = load_bench(args.bench or "checkpoints")
    for name in args.concept or ():
        find_concept(name) if bench is None else bench.find(name)
    written = {"--out": args.out, "--pictures": args.pictures, "--report": args.report}
    for file in written.values():
        if file is not None:
            check_writable(file)
    read = [options.split_strength(text)[0] for text in (*args.patch, *(args.earlier or ()))] + list(args.bench or ())
    check_distinct(written, {f"'{path}'": path for path in read})
    if args.pictures is not None and args.pictures.suffix.lower() != ".png":
        raise RequestError(f"--pictures '{args.pictures}' is not a .png file: choose a name that ends in .png.")
    if args.report is not None and args.report.suffix.lower() not in (".html", ".htm"):
        raise RequestError(f"--report '{args.report}' is not an .html file: choose a name that ends in .html.")
    options.warn_of_strengths(args.patch, console)
    model, evaluators = options.load_evaluators(args, bench, console, quality=args.report is not None)
    patches = options.load_patches(args.patch, model)
    earlier = [patch for patch, _ in options.load_patches(args.earlier, model)]
    forgotten = concepts_of([patch for patch, _ in patches])
    names = args.concept or forgotten
    if not names:
        raise RequestError("The patch does not name the concepts it forgets: name them with --concept.")
    settings = EvaluationSettings(
        args.count,
        args.seed,
        (UNEDITED,) if args.no_baselines else BASELINES,
        options.sampling_of(args, model),
        quality=args.report is not None,
        drift=args.report is not None,
        attention=args.report is not None,
        m_score=args.m_score,
        attacks=args.attack,
        stress=FULL if args.full else None,
    )
    with console.progress("measuring") as progress:
        report = assess(
            model,
            evaluators,
            patches,
            names,
            settings,
            bench=bench,
            earlier=earlier,
            # other concepts that the same patches forget are not part of the retain set
            without=forgotten if bench is not None else [name for name in forgotten if _is_known(name)],
            files=[Path(options.split_strength(text)[0]).name for text in args.patch],
            progress=progress,
            workspace=None if args.work is None else Workspace(args.work),
        )
    found = report.evaluations
    show(found, console)
    _show_details(report, console)
    _show_more(report, console)
    data = {
        "schema": 1,
        "model": model.name,
        "patches": [dict(zip(("file", "strength"), options.split_strength(text), strict=True)) for text in args.patch],
        "count": args.count,
        "seed": args.seed,
        "steps": settings.sampling.steps,
        "guidance": settings.sampling.guidance,
        "concepts": [one.as_dict() for one in found],
    }
    for part in ("outcomes", "second_judge", *_FULL_PARTS, "attacks", "m_scores", "erosion"):
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


def _show_details(report: Report, console: Console) -> None:
    """Print what stands beside the means: the lowest kept concept, what is drawn instead, and the stress tests."""
    from ..evaluation.report.verdict import percent, span
    from ..evaluation.retention import ENOUGH, lowest

    for one in report.evaluations:
        least = lowest(one.retained)
        if least is None or least.kept is None:
            console.say(
                f"{one.concept}: no kept concept has the {ENOUGH} pictures that naming the lowest takes (--full draws "
                "them)."
            )
        else:
            wording = f", least as '{least.wording}'" if least.wording else ""
            console.say(
                f"{one.concept}: the lowest kept concept is {least.name}, {percent(least.kept.value)} "
                f"({span(least.kept)}, n {least.n}){wording}."
            )
    for found in report.outcomes:
        parts = [f"the concept {percent(found.shown.value)}"]
        if found.replacement is not None:
            parts.append(f"{found.name} {percent(found.replacement.value)}")
        parts += [f"nothing known {percent(found.nothing.value)}", f"another concept {percent(found.other.value)}"]
        others = ", ".join(name for name, _ in found.others[:3])
        console.say(f"{found.concept}: its prompts show {', '.join(parts)}{f' ({others})' if others else ''}.")
    if report.second_judge:
        rows = [
            [f"{one.concept}\n  {VARIANT_TITLES[one.variant]}", cell(one.differ), cell(one.ua)]
            for one in report.second_judge
        ]
        console.table(["second judge", "differs", "UA"], rows)
    if report.wordings:
        rows = [
            [f"{one.wording}, {one.concept}", cell(one.shown), _maybe(one.forgotten), _maybe(one.kept)]
            for one in report.wordings
        ]
        console.table(["held-out wording", "shown before", "forgotten", "kept"], rows)
        console.say("Forgotten: of the pictures that showed it before; – where the unedited model shows none.")
    if report.strengths:
        rows = [[f"{one.strength:g}, {one.concept}", cell(one.ua), cell(one.ira)] for one in report.strengths]
        console.table(["strength", "UA", "IRA"], rows)
    if report.image_to_image:
        rows = [
            [f"{one.prompt} prompt, {one.concept}", cell(one.before), cell(one.after)] for one in report.image_to_image
        ]
        console.table(["image to image", "shown before", "shown after"], rows)


def _maybe(score: Score | None) -> str:
    return "–" if score is None else cell(score)


def _show_more(report: Report, console: Console) -> None:
    """Print attacks, M-Scores and erosion, if requested, and what had to be left out."""
    if report.attacks:
        rows = [
            [f"{one.name}, {one.concept}", "–" if one.before is None else cell(one.before), cell(one.after), one.budget]
            for one in report.attacks
        ]
        console.table(["attack", "before", "after", "budget"], rows)
        console.say("Share of pictures that show the concept again, for the strongest prompts of each attack.")
    if report.m_scores:
        rows = [[one.concept, f"{one.before:.3f}", f"{one.after:.3f}"] for one in report.m_scores]
        console.table(["M-Score", "before", "after"], rows)
        console.say("Cosine similarity of the embedding that textual inversion learns to the concept's own words.")
    if report.erosion:
        rows = [[f"{one.step}: {one.concept}", cell(one.kept)] for one in report.erosion]
        console.table(["after request", "kept"], rows)
    for part, why in report.left_out.items():
        console.note(f"left out: {report.PARTS.get(part, part)}: {why}")


def concepts_of(patches: Sequence[Patch]) -> list[str]:
    """The distinct concepts named in the metadata of the patches."""
    return list(dict.fromkeys(name for patch in patches for name in patch.about.concepts or ()))


def _is_known(name: str) -> bool:
    from ..evaluation import find_concept

    try:
        find_concept(name)
    except RequestError:
        return False
    return True


def show(found: Sequence[Evaluation], console: Console, title: str | None = None) -> None:
    """Print the scores as a table: one row per concept and variant, each score with its n and its interval."""
    rows = []
    for one in found:
        for variant, scores in one.scores.items():
            cells = [cell(score) for score in (scores.ua, scores.ira, scores.cra, scores.cra_target)]
            rows.append([f"{one.concept}, {one.category}\n  {VARIANT_TITLES[variant]}", *cells])
    console.table(["", "UA", "IRA", "CRA", "CRA on target"], rows, title)
    for line in LEGEND:
        console.say(line)


def cell(score: Score) -> str:
    """Format a score: the value and its n, with the 95 % interval on a second line."""
    return f"{score.value:.2f}  n {score.n}\n{score.low:.2f} – {score.high:.2f}"
