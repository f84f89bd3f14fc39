"""Options that several commands share, and what is read from them."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RequestError

if TYPE_CHECKING:
    from ..evaluation import SamplingSettings
    from ..evaluation.assess import Evaluators
    from ..evaluation.bench.concept_bench import ConceptBench
    from ..mini.probe import Probe
    from ..models.latent_diffusion import LatentDiffusion
    from ..patch.patch import Patch
    from .console import Console

__all__ = [
    "Parser",
    "add_judge",
    "add_model",
    "add_patches",
    "add_sampling",
    "load_embedded",
    "load_model",
    "load_patches",
    "sampling_of",
    "split_strength",
    "whole",
]


class Parser(argparse.ArgumentParser):
    """argparse's parser, except that a mistake is one sentence and exit code 1, like every other error of a user."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise RequestError(f"{message[:1].upper()}{message[1:]} ({self.prog} --help says more).")


def whole(least: int = 0) -> Callable[[str], int]:
    """An argparse type: a whole number of at least ``least``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small: it must be at least {least}")
        return value

    return read


def finite(text: str) -> float:
    """An argparse type: a finite number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="mini",
        help="'mini' (the embedded model), a diffusers folder or a single-file .safetensors checkpoint (default: mini)",
    )
    parser.add_argument("--device", help="where to work, such as cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--clip-skip", type=whole(1), default=1, metavar="N", help="the text encoder's layer, counted from the last one"
    )
    parser.add_argument(
        "--config", metavar="DIR", help="a diffusers folder with a single file's configuration, to load it offline"
    )


def add_sampling(parser: argparse.ArgumentParser, steps: int, guidance: float | None, batch: int = 32) -> None:
    parser.add_argument("--steps", type=whole(1), default=steps, help=f"sampling steps (default: {steps})")
    parser.add_argument("--sampler", choices=("dpm++", "ddim"), default="dpm++", help="how to sample (default: dpm++)")
    usual = "2.5 on the embedded model, 7.5 on others" if guidance is None else f"{guidance:g}"
    parser.add_argument("--guidance", type=finite, default=guidance, help=f"guidance scale (default: {usual})")
    parser.add_argument("--batch", type=whole(1), default=batch, help=f"pictures at a time (default: {batch})")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the UNet while sampling; auto takes bfloat16 where it is clearly faster (default: auto)",
    )


def sampling_of(args: argparse.Namespace, model: LatentDiffusion | None = None) -> SamplingSettings:
    """The :class:`SamplingSettings` that :func:`add_sampling`'s options say; the ``model``'s guidance if none."""
    from ..evaluation import SamplingSettings

    guidance = model.guidance if args.guidance is None and model is not None else args.guidance
    return SamplingSettings(args.steps, guidance, args.batch, args.precision, args.sampler)


def add_patches(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument(
        "--patch",
        action="append",
        required=required,
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a patch to put on, at its strength (default: 1); may be given several times",
    )


def split_strength(text: str) -> tuple[str, float]:
    """``FILE[:STRENGTH]`` in its parts. Raises :class:`RequestError` where the strength is no finite number."""
    if Path(text).exists():
        return text, 1.0
    path, colon, strength = text.rpartition(":")
    # a colon also follows a Windows drive's letter
    if not colon or not path or "/" in strength or "\\" in strength or strength.endswith(".safetensors"):
        return text, 1.0
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"The strength '{strength}' in '{text}' is not a finite number.")
    return path, value


def load_patches(given: Sequence[str], model: LatentDiffusion) -> list[tuple[Patch, float]]:
    """The patches of ``--patch``, read and held against the model; raises in words, with nothing put on."""
    from ..formats import load_patch

    patches = []
    for path, strength in map(split_strength, given):
        patch = load_patch(path, model.survey)
        patch.check_fits(model.survey)
        patches.append((patch, strength))
    return patches


def load_model(args: argparse.Namespace, console: Console) -> LatentDiffusion:
    """The model of ``--model`` on ``--device``."""
    import torch

    from .. import api

    extra = {"clip_skip": args.clip_skip, "config": args.config} if "clip_skip" in args else {}
    _quieten()
    device = device_of(args)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"The device '{device}' cannot be used here: {str(error).splitlines()[0]}") from error
    with console.progress(f"loading {args.model}"):
        return api.load_model(args.model, device=device, **extra)


def _quieten() -> None:
    """Keep what the libraries tell their developers (deprecations, missing CUDA) from the person at the terminal."""
    import logging
    import warnings

    for library in ("diffusers", "transformers"):
        os.environ.setdefault(f"{library.upper()}_VERBOSITY", "error")  # read once, when they are imported
        logging.getLogger(library).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=library)


def load_embedded(args: argparse.Namespace, console: Console) -> tuple[LatentDiffusion, Probe]:
    """The model and the probe that goes with it; only the embedded model's pictures can be measured by it."""
    from ..mini import load_probe

    model = load_model(args, console)
    if model.name != "mini":
        raise RequestError(
            f"The probe knows only what the embedded model draws, so '{args.model}' cannot be measured: "
            "use --model mini."
        )
    return model, load_probe().to(model.device)


def add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clip",
        default="openai/clip-vit-base-patch32",
        metavar="NAME",
        help="who judges a checkpoint's pictures: a CLIP on the Hugging Face hub, or a folder with one (default: "
        "openai/clip-vit-base-patch32)",
    )
    parser.add_argument(
        "--clip-weights",
        metavar="NAME",
        help="read the CLIP by open_clip instead: its name of weights, or a file; --clip is then open_clip's name too",
    )


def load_evaluators(
    args: argparse.Namespace, bench: ConceptBench | None, console: Console, quality: bool = False
) -> tuple[LatentDiffusion, Evaluators]:
    """The model, and what looks at its pictures: the embedded one's probe, else the CLIP of :func:`add_judge`.

    With ``quality`` also what FID, KID and LPIPS of a checkpoint need, as far as it can be had.
    """
    from ..errors import ForgetConceptError
    from ..evaluation.assess import Evaluators
    from ..evaluation.judges import ClipJudge
    from ..evaluation.metrics import LPIPS, ImageText, InceptionFeatures, OpenClip, TransformersClip

    if args.model == "mini":
        model, probe = load_embedded(args, console)
        return model, Evaluators.embedded(probe)
    if bench is None:
        raise RequestError(f"'{args.model}' has no world of its own to ask about: name a benchmark with --bench.")
    # the judge first: it is the smaller one, and the one that may be missing
    device = device_of(args)
    if args.clip_weights is None and not args.clip.startswith(("local-dir:", "hf-hub:")):
        words: ImageText = TransformersClip(args.clip, device)
    else:
        words = OpenClip(args.clip, args.clip_weights, device)
    features, distance, missing = None, None, {}
    if quality:
        try:
            features, distance = InceptionFeatures(device), LPIPS(device=device)
        except ForgetConceptError as error:
            missing["metrics"] = str(error)
    judge = ClipJudge(words, bench.names())
    return load_model(args, console), Evaluators(judge, features, distance, words, missing)


def device_of(args: argparse.Namespace) -> str:
    """Where to work: the option, or cuda where there is one."""
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")
