"""``forget-concept export``: write the embedded model as one checkpoint in the original layout that hosts read."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from ..errors import RequestError
from .console import Console
from .files import check_folder, make_folder

HELP = "write the embedded model as one .safetensors checkpoint with its YAML configuration"
NAME = "forget-concept-mini"
TEXT_FOLDER = f"{NAME}-text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="output folder, such as models/Stable-diffusion")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from ..files.safetensors_io import MODEL_SUFFIXES
    from ..mini import ldm, weights_folder

    if args.out.suffix.lower() in MODEL_SUFFIXES and not args.out.is_dir():
        raise RequestError(
            f"'{args.out}' has a file's ending, and --out is a folder: the checkpoint in it is {NAME}.safetensors."
        )
    check_folder(args.out)
    parts = ldm.read_parts(weights_folder())
    folder = make_folder(args.out)
    # the YAML refers to the text encoder and its tokenizer by their folder
    text = make_folder(folder / TEXT_FOLDER)
    for source in (weights_folder() / "tokenizer", weights_folder() / "text_encoder"):
        for file in source.iterdir():
            shutil.copyfile(file, text / file.name.replace(".fp16.", "."))
    checkpoint = folder / f"{NAME}.safetensors"
    ldm.save_checkpoint(parts, checkpoint, str(text.resolve()))
    size = checkpoint.stat().st_size
    console.say(f"{checkpoint} ({size / 1e6:.1f} MB), {checkpoint.with_suffix('.yaml').name} and {TEXT_FOLDER}/")
    console.say("The YAML contains the absolute path of the text folder: export again after moving it.")
    return {
        "schema": 1,
        "checkpoint": str(checkpoint),
        "config": str(checkpoint.with_suffix(".yaml")),
        "text_encoder": str(text),
        "bytes": size,
    }
