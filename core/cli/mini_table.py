"""``forget-concept mini-table``: measure how well an embedded model follows prompts that it was not trained on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..mini.files import NAMES as EMBEDDED
from . import options
from .console import Console
from .files import check_writable, write_json

HELP = "measure how well an embedded model follows held-out prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=options.whole(1), default=500, help="held-out prompts (default: 500)")
    parser.add_argument(
        "--seed", type=options.whole(), default=700_000, help="seed of the prompts and pictures (default: 700000)"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the table as JSON")
    options.add_sampling(parser, steps=25, guidance=None)
    parser.add_argument("--device", help="device, such as cpu or cuda (default: cuda if available)")
    parser.add_argument("--model", choices=EMBEDDED, default="mini", help="embedded model (default: mini)")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from ..evaluation import mini_table
    from ..evaluation.pooled_use import pooled_use
    from ..models.text_entries import POOLED

    if args.out is not None:
        check_writable(args.out)
    model, probe = options.load_embedded(args, console)
    sampling = options.sampling_of(args, model)
    with console.progress(f"generating {args.count} pictures") as progress:
        table = mini_table(model, probe, args.count, args.seed, sampling, progress)
    rows = []
    for category, score in table.accuracy.items():
        weakest = table.weakest[category]
        words = "-" if weakest is None else f"{weakest[0]} ({100 * weakest[1].value:.0f} % of {weakest[1].n})"
        rows.append([category, f"{100 * score.value:.1f} %", interval(score), str(score.n), words])
    title = f"{table.prompts} held-out prompts, {table.sampling.steps} steps, guidance {table.sampling.guidance:g}"
    console.table(["the probe finds the prompted", "share", "95 % interval", "n", "weakest"], rows, title)
    data = {"schema": 1, "model": args.model, "seed": args.seed, **table.as_dict()}
    if model.survey.width(POOLED) is not None:
        with console.progress("tokens and pooled vectors of different prompts") as progress:
            use = pooled_use(model, probe, sampling=sampling, progress=progress)
        console.table(
            [f"'{use.concept}' found, tokens of '{use.tokens}'", "share", "95 % interval", "n"],
            [
                [f"pooled vector of '{named}'", f"{100 * score.value:.1f} %", interval(score), str(score.n)]
                for named, score in ((use.concept, use.own), (use.third, use.other))
            ],
            "What the pooled vector alone brings in",
        )
        data["pooled"] = use.as_dict()
    if args.out is not None:
        write_json(args.out, data)
    return data


def interval(score: Any) -> str:
    """Format the 95 % interval of a score, in percent."""
    return f"{100 * score.low:.1f} – {100 * score.high:.1f}"
