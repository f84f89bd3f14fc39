"""``forget-concept export``: write an embedded model as one checkpoint in the original layout that hosts read."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..mini.files import NAMES
from .console import Console
from .files import check_folder, make_folder

HELP = "write an embedded model as one .safetensors checkpoint with its YAML configuration"
# in the layouts of SD1 and of SDXL; hosts load models of Flux's kind in parts
MODELS = tuple(name for name in NAMES if name in ("mini", "mini-xl"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="the embedded model (default: mini)")
    parser.add_argument("--out", type=Path, required=True, help="output folder, such as models/Stable-diffusion")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from ..files.safetensors_io import MODEL_SUFFIXES
    from ..mini import ldm, ldm_xl, weights_folder

    name = f"forget-concept-{args.model}"
    text_folder = f"{name}-text"
    if args.out.suffix.lower() in MODEL_SUFFIXES and not args.out.is_dir():
        raise RequestError(
            f"'{args.out}' has a file's ending, and --out is a folder: the checkpoint in it is {name}.safetensors."
        )
    check_folder(args.out)
    shared, own = weights_folder(), weights_folder(args.model)
    parts = ldm.read_parts(shared)
    folder = make_folder(args.out)
    # the YAML refers to the text encoder and its tokenizer by their folder
    text = make_folder(folder / text_folder)
    for source in (shared / "tokenizer", own / "text_encoder"):
        for file in source.iterdir():
            shutil.copyfile(file, text / file.name.replace(".fp16.", "."))
    checkpoint = folder / f"{name}.safetensors"
    if args.model == "mini":
        ldm.save_checkpoint(parts, checkpoint, str(text.resolve()))
    else:
        ldm_xl.save_checkpoint(own, shared, checkpoint, text)
    size = checkpoint.stat().st_size
    console.say(f"{checkpoint} ({size / 1e6:.1f} MB), {checkpoint.with_suffix('.yaml').name} and {text_folder}/")
    if args.model != "mini":
        console.say(
            f"A program that loads it has to know its second text encoder: open_clip.add_model_config('{text_folder}')."
        )
    console.say("The YAML contains the absolute path of the text folder: export again after moving it.")
    return {
        "schema": 1,
        "checkpoint": str(checkpoint),
        "config": str(checkpoint.with_suffix(".yaml")),
        "text_encoder": str(text),
        "bytes": size,
    }
