"""``forget-concept restore``: remove requests from a patch that holds several, so that the model knows them again."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ..errors import RequestError
from . import options
from .console import Console
from .files import check_patch_file
from .forget import requests_to_dict

HELP = "remove a concept from a patch that forgets several"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a patch (.safetensors) with a record of its requests")
    parser.add_argument("--concept", action="append", metavar="NAME", help="concept to restore; repeatable")
    parser.add_argument(
        "--number",
        action="append",
        type=options.whole(1),
        metavar="N",
        help="number of a whole request to restore, as shown by 'forget-concept inspect'; repeatable",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="patch file to write, with the remaining requests"
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="dtype of the file (default: fp32)")
    options.add_model(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    import torch

    from ..files.safetensors_io import read_metadata
    from ..formats import context_map, kohya, load_patch
    from ..methods.sequence import History
    from ..patch.metadata import PatchMetadata

    wanted: list[int | str] = [*(args.concept or ()), *(args.number or ())]
    if not wanted:
        raise RequestError("Nothing to restore: give --concept NAME or --number N.")
    out = check_patch_file(args.out)
    # the model is loaded only if needed: to solve closed forms again, or to expand a context map
    map_only = PatchMetadata.from_strings(read_metadata(args.file)).format == context_map.FORMAT
    model = options.load_model(args, console) if map_only else None
    history = History.from_patch(load_patch(args.file, None if model is None else model.survey))
    began = time.perf_counter()
    restored: list[str] = []
    trained_on_top: set[int] = set()
    for which in wanted:
        before = history.concepts
        trained_on_top |= {one.number for one in history.trained_on(which)}
        if history.solves_anew(which):
            model = model or options.load_model(args, console)
            with console.progress("solving for the remaining requests") as progress:
                history = history.without(which, model, progress)
        else:
            history = history.without(which)
        restored += [concept.name for concept in before if concept not in history.concepts]
    if not history.parts:
        raise RequestError(
            f"'{args.file}' would be empty without these requests: use the model without the patch instead."
        )
    seconds = time.perf_counter() - began
    patch = history.patch
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[args.dtype]
    kohya.save(patch, out, None if model is None else model.survey, dtype)
    names = " and ".join(f"'{name}'" for name in restored)
    console.say(f"Restored {names} in {seconds:.2f} s.")
    left = [record.names for record in history.records if record.number in trained_on_top]
    if left:
        console.say(f"{' and '.join(left)} were trained on top of it, and stay as they were trained.")
    console.say(f"{out}: {len(patch)} layers, rank {patch.rank}, {out.stat().st_size:,} bytes")
    return {
        "schema": 1,
        "patch": str(out),
        "restored": restored,
        "requests": requests_to_dict(history.records),
        "layers": len(patch),
        "rank": patch.rank,
        "bytes": out.stat().st_size,
        "seconds": seconds,
    }
