"""``forget-concept evaluate``: what a patch forgot and what it kept, beside its baselines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from . import options
from .console import Console
from .files import check_writable, write_json, write_picture

if TYPE_CHECKING:
    from ..evaluation import Evaluation, Score
    from ..patch import Patch

HELP = "measure what a patch forgot and what it kept (on the embedded model)"
EXPLAINED = (
    "Fractions, n and 95 % intervals. UA: the probe no longer finds the concept in prompts that name it.",
    "IRA, CRA: prompts without it still show what they name, of the same category and of other ones;",
    "CRA on target: so does what else its own prompts name. These three as shares of the unedited model's.",
)
SPOKEN = {"patched": "patched", "unedited": "unedited model", "negative_prompt": "negative prompt"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_patches(parser, required=True)
    parser.add_argument(
        "--concept", action="append", metavar="NAME", help="what to measure (default: the concepts the patches name)"
    )
    parser.add_argument("--count", type=options.whole(4), default=200, help="pictures in each cell (default: 200)")
    parser.add_argument("--seed", type=options.whole(), default=0, help="of the prompts and pictures (default: 0)")
    parser.add_argument(
        "--no-baselines", action="store_true", help="leave out the negative prompt: a third less to draw"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the figures as JSON")
    parser.add_argument("--pictures", metavar="FILE.png", type=Path, help="also write pictures before and after")
    options.add_sampling(parser, steps=16, guidance=2.5)
    options.add_model(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from ..evaluation import NEGATIVE, UNEDITED, Subject, evaluate, known_concept
    from ..evaluation.pictures import before_after

    for name in args.concept or ():
        known_concept(name)
    for file in (args.out, args.pictures):
        if file is not None:
            check_writable(file)
    if args.pictures is not None and args.pictures.suffix.lower() != ".png":
        raise RequestError(f"'{args.pictures}' cannot be written: pictures are .png files.")
    model, probe = options.load_embedded(args, console)
    patches = options.load_patches(args.patch, model)
    forgotten = concepts_of([patch for patch, _ in patches])
    names = args.concept or forgotten
    if not names:
        raise RequestError("The patch does not say what it forgets: name it with --concept.")
    subjects = [Subject(name, tuple(patches)) for name in dict.fromkeys(names)]
    with console.progress("measuring") as progress:
        found = evaluate(
            model,
            probe,
            subjects,
            args.count,
            args.seed,
            options.sampling_of(args),
            # another concept that the same patches forget is not to be kept either
            without=[name for name in forgotten if _is_known(name)],
            baselines=(UNEDITED,) if args.no_baselines else (UNEDITED, NEGATIVE),
            progress=progress,
        )
    show(found, console)
    data = {
        "schema": 1,
        "model": model.name,
        "patches": [dict(zip(("file", "strength"), options.split_strength(text), strict=True)) for text in args.patch],
        "count": args.count,
        "seed": args.seed,
        "steps": args.steps,
        "guidance": args.guidance,
        "concepts": [one.as_dict() for one in found],
    }
    if args.pictures is not None:
        write_picture(args.pictures, before_after(found, "Before and after"))
    if args.out is not None:
        write_json(args.out, data)
    return data


def concepts_of(patches: Sequence[Patch]) -> list[str]:
    """The concepts that the patches' metadata name, each once."""
    names: list[str] = []
    for patch in patches:
        try:
            names += list(json.loads(patch.metadata.get("forget_concept.concepts", "[]")))
        except (json.JSONDecodeError, TypeError):
            continue  # another program's entry of that name
    return list(dict.fromkeys(names))


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
