"""``forget-concept mini-table``: measure how well the embedded model follows prompts that it was not trained on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import options
from .console import Console
from .files import check_writable, write_json

HELP = "measure how well the embedded model follows held-out prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=options.whole(1), default=500, help="held-out prompts (default: 500)")
    parser.add_argument(
        "--seed", type=options.whole(), default=700_000, help="seed of the prompts and pictures (default: 700000)"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the table as JSON")
    options.add_sampling(parser, steps=25, guidance=2.5)
    parser.add_argument("--device", help="device, such as cpu or cuda (default: cuda if available)")
    parser.set_defaults(model="mini")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from ..evaluation import mini_table

    if args.out is not None:
        check_writable(args.out)
    model, probe = options.load_embedded(args, console)
    with console.progress(f"generating {args.count} pictures") as progress:
        table = mini_table(model, probe, args.count, args.seed, options.sampling_of(args), progress)
    rows = []
    for category, score in table.accuracy.items():
        weakest = table.weakest[category]
        words = "-" if weakest is None else f"{weakest[0]} ({100 * weakest[1].value:.0f} % of {weakest[1].n})"
        rows.append([category, f"{100 * score.value:.1f} %", interval(score), str(score.n), words])
    title = f"{table.prompts} held-out prompts, {table.sampling.steps} steps, guidance {table.sampling.guidance:g}"
    console.table(["the probe finds the prompted", "share", "95 % interval", "n", "weakest"], rows, title)
    data = {"schema": 1, "model": "mini", "seed": args.seed, **table.as_dict()}
    if args.out is not None:
        write_json(args.out, data)
    return data


def interval(score: Any) -> str:
    """Format the 95 % interval of a score, in percent."""
    return f"{100 * score.low:.1f} – {100 * score.high:.1f}"
