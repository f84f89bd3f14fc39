"""``forget-concept generate``: generate pictures, with or without patches."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from . import options
from .console import Console
from .files import check_folder, check_writable, make_folder, write_picture

if TYPE_CHECKING:
    from torch import Tensor

HELP = "generate pictures, with or without patches and a negative prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", required=True, metavar="WORDS", help="a prompt; repeatable")
    parser.add_argument("--negative", default="", metavar="WORDS", help="a negative prompt (default: none)")
    options.add_patches(parser)
    parser.add_argument(
        "--seed", type=options.whole(), default=0, help="seed of the first picture of each prompt (default: 0)"
    )
    parser.add_argument(
        "--count", type=options.whole(1), default=1, help="pictures per prompt, with consecutive seeds (default: 1)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="NAME.png for one picture, or one contact sheet of several; otherwise a folder, with one file per picture",
    )
    options.add_sampling(parser, steps=30, guidance=None, batch=16)
    options.add_model(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from ..evaluation.drawing import Picture, Variant, draw
    from ..evaluation.pictures import contact_sheet
    from ..models.images import to_pil
    from ..models.token_positions import end_position
    from ..progress import ProgressEvent

    out: Path = args.out
    one_file = out.suffix.lower() == ".png"
    if not one_file and out.suffix and not out.is_dir():
        raise RequestError(f"--out '{out}' is neither a .png file nor a folder: choose a name that ends in .png.")
    if one_file:
        check_writable(out)
    else:
        check_folder(out)
    pictures = [Picture(prompt, args.seed + i) for prompt in args.prompt for i in range(args.count)]
    options.warn_of_strengths(args.patch, console)
    model = options.load_model(args, console)
    patches = options.load_patches(args.patch, model)
    for prompt in (*args.prompt, args.negative):
        end_position(model.text, prompt)  # raises for a prompt that would be truncated silently
    sampling = options.sampling_of(args, model).resolved(model)
    batches = -(-len(pictures) // sampling.batch)
    drawn: list[Tensor] = []
    with console.progress(f"drawing {len(pictures)} picture{'s' if len(pictures) > 1 else ''}") as progress:

        def inner(event: ProgressEvent) -> None:
            done = len(drawn) // sampling.batch * sampling.steps
            progress(ProgressEvent(done + event.step, batches * sampling.steps))

        for images in draw(model, pictures, Variant(tuple(patches), args.negative), sampling, inner):
            drawn += list(images)
    notes = {
        "model": model.name,
        "negative": args.negative,
        "steps": str(sampling.steps),
        "guidance": str(sampling.guidance),
        "patches": json.dumps(args.patch, ensure_ascii=False),
    }
    if one_file and len(drawn) == 1:
        write_picture(out, to_pil(drawn[0]), notes | {"prompt": pictures[0].prompt, "seed": str(pictures[0].seed)})
        files = [out]
    elif one_file:
        captions = [f"{picture.prompt} ({picture.seed})" for picture in pictures]
        write_picture(
            out, contact_sheet(drawn, captions), notes | {"prompts": json.dumps(captions, ensure_ascii=False)}
        )
        files = [out] * len(drawn)
    else:
        files = [make_folder(out) / f"{i:04d}.png" for i in range(len(drawn))]
        for file, image, picture in zip(files, drawn, pictures, strict=True):
            write_picture(file, to_pil(image), notes | {"prompt": picture.prompt, "seed": str(picture.seed)})
    console.say(f"{len(drawn)} picture{'s' if len(drawn) > 1 else ''}: {out}")
    return {
        "schema": 1,
        "model": model.name,
        "patches": [dict(zip(("file", "strength"), options.split_strength(text), strict=True)) for text in args.patch],
        "negative": args.negative,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "precision": sampling.precision,
        "pictures": [
            {"file": str(file), "prompt": picture.prompt, "seed": picture.seed}
            for file, picture in zip(files, pictures, strict=True)
        ],
    }
