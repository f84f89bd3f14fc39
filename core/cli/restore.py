"""``forget-concept restore``: one request taken back out of a patch that holds several."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ..errors import RequestError
from . import options
from .console import Console
from .files import check_writable
from .forget import requests_to_dict

HELP = "take a concept back out of a patch that forgets several"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a patch (.safetensors) that says which requests made it")
    parser.add_argument(
        "--concept", action="append", metavar="NAME", help="what to bring back; may be given several times"
    )
    parser.add_argument(
        "--number",
        action="append",
        type=options.whole(1),
        metavar="N",
        help="a whole request to take back, by its number in 'forget-concept inspect'; may be given several times",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the patch that is left")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the file (default: fp32)")
    options.add_model(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    import torch

    from ..files.safetensors_io import read_metadata
    from ..formats import context_map, kohya, load_patch
    from ..methods.sequence import History
    from ..patch.metadata import PatchMetadata

    wanted: list[int | str] = [*(args.concept or ()), *(args.number or ())]
    if not wanted:
        raise RequestError("Nothing to take back: give --concept NAME or --number N.")
    out = check_writable(args.out)
    # a model is loaded only where it has a part in this: closed forms are solved again, a context map is expanded
    map_only = PatchMetadata.from_strings(read_metadata(args.file)).format == context_map.FORMAT
    model = options.load_model(args, console) if map_only else None
    history = History.from_patch(load_patch(args.file, None if model is None else model.survey))
    began = time.perf_counter()
    back: list[str] = []
    on_it: set[int] = set()
    for which in wanted:
        before = history.concepts
        on_it |= {one.number for one in history.trained_on(which)}
        if history.solves_anew(which):
            model = model or options.load_model(args, console)
            with console.progress("solving for what is left") as progress:
                history = history.without(which, model, progress)
        else:
            history = history.without(which)
        back += [concept.name for concept in before if concept not in history.concepts]
    if not history.parts:
        raise RequestError(
            f"Nothing would be left of '{args.file}': the model without it forgets nothing, so no patch is needed."
        )
    seconds = time.perf_counter() - began
    patch = history.patch
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[args.dtype]
    kohya.save(patch, out, None if model is None else model.survey, dtype)
    names = " and ".join(f"'{name}'" for name in back)
    console.say(f"Took {names} back in {seconds:.2f} s.")
    left = [record.names for record in history.records if record.number in on_it]
    if left:
        console.say(f"{' and '.join(left)} were trained with it on, and stay as they were trained.")
    console.say(f"{out}: {len(patch)} layers, rank {patch.rank}, {out.stat().st_size:,} bytes")
    return {
        "schema": 1,
        "patch": str(out),
        "restored": back,
        "requests": requests_to_dict(history.records),
        "layers": len(patch),
        "rank": patch.rank,
        "bytes": out.stat().st_size,
        "seconds": seconds,
    }
