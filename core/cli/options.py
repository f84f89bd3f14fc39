"""Options that several commands share, and the objects made from them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ForgetConceptError, RequestError
from ..mini.files import NAMES as EMBEDDED
from ..request.request import check_patch_strength, strength_warning

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
    "warn_of_strengths",
    "whole",
]


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that raises :class:`RequestError`, so that usage errors end like all other user errors."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise RequestError(f"{message[:1].upper()}{message[1:]} (see {self.prog} --help).")


def whole(least: int = 0) -> Callable[[str], int]:
    """Return an argparse type for whole numbers of at least ``least``."""

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
    """Argparse type for finite numbers."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`load_model` reads."""
    parser.add_argument(
        "--model",
        default="mini",
        help="'mini' (the embedded model), a diffusers folder or a single-file .safetensors checkpoint (default: mini)",
    )
    parser.add_argument("--device", help="device, such as cpu or cuda (default: cuda if available)")
    parser.add_argument(
        "--clip-skip",
        type=whole(1),
        default=1,
        metavar="N",
        help="layer of the text encoder to use, counted from the last (default: 1)",
    )
    parser.add_argument(
        "--config",
        metavar="DIR",
        help="a diffusers folder with the configuration of a single-file checkpoint, to load it offline",
    )


# steps of a model that is used without guidance, because it is distilled
_DISTILLED_STEPS = 8


def add_sampling(parser: argparse.ArgumentParser, steps: int, guidance: float | None, batch: int = 32) -> None:
    """Add the options that :func:`sampling_of` reads, with these defaults; ``guidance`` ``None`` is the model's own."""
    usual_steps = f"{steps}" if guidance is not None else f"{steps}; {_DISTILLED_STEPS} for a guidance-distilled model"
    parser.add_argument(
        "--steps",
        type=whole(1),
        default=None if guidance is None else steps,
        help=f"sampling steps (default: {usual_steps})",
    )
    parser.set_defaults(usual_steps=steps)
    parser.add_argument("--sampler", choices=("dpm++", "ddim"), default="dpm++", help="sampler (default: dpm++)")
    usual = "that of the model: 2.5 for mini, 7.5 for others" if guidance is None else f"{guidance:g}"
    parser.add_argument("--guidance", type=finite, default=guidance, help=f"guidance scale (default: {usual})")
    parser.add_argument("--batch", type=whole(1), default=batch, help=f"pictures per batch (default: {batch})")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="precision of the UNet while sampling; auto chooses bfloat16 where it is clearly faster (default: auto)",
    )


def sampling_of(args: argparse.Namespace, model: LatentDiffusion | None = None) -> SamplingSettings:
    """:class:`SamplingSettings` from the options of :func:`add_sampling`; what was left out is that of ``model``."""
    from ..evaluation import SamplingSettings

    guidance = model.guidance if args.guidance is None and model is not None else args.guidance
    distilled = model is not None and model.guidance == 1
    steps = args.steps or (_DISTILLED_STEPS if distilled else args.usual_steps)
    return SamplingSettings(steps, guidance, args.batch, args.precision, args.sampler)


def add_patches(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Add the option that :func:`load_patches` reads."""
    parser.add_argument(
        "--patch",
        action="append",
        type=_checked_patch,
        required=required,
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a patch to apply, and its strength (default: 1); repeatable",
    )


def _checked_patch(text: str) -> str:
    """Argparse type that refuses a wrong strength before a model is loaded."""
    try:
        split_strength(text)
    except ForgetConceptError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error
    return text


def split_strength(text: str) -> tuple[str, float]:
    """Split ``FILE[:STRENGTH]`` into path and strength (default: 1).

    Raises:
        RequestError: If the strength is not a finite number.
        PatchError: If it is out of range.
    """
    if Path(text).exists():
        return text, 1.0
    path, colon, strength = text.rpartition(":")
    # a colon also follows a drive letter on Windows
    file_name = "/" in strength or "\\" in strength or strength.lower().endswith((".safetensors", ".sft"))
    if not colon or not path or file_name:
        return text, 1.0
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"The strength '{strength}' in '{text}' is not a finite number: write FILE:0.8, say.")
    check_patch_strength(value)
    return path, value


def warn_of_strengths(given: Sequence[str], console: Console) -> None:
    """Print a warning for every patch of ``--patch`` whose strength is known to damage pictures."""
    for path, strength in map(split_strength, given):
        if (warning := strength_warning(strength)) is not None:
            console.note(f"warning: {path}: {warning}")


def load_patches(given: Sequence[str], model: LatentDiffusion) -> list[tuple[Patch, float]]:
    """Read the patches of ``--patch`` with their strengths, and check that each fits the model; applies none.

    Raises:
        ForgetConceptError: If a file cannot be read, or a patch does not fit.
    """
    from ..formats import load_patch

    patches = []
    for path, strength in map(split_strength, given):
        patch = load_patch(path, model.survey)
        patch.check_fits(model.survey)
        patches.append((patch, strength))
    return patches


def load_model(args: argparse.Namespace, console: Console) -> LatentDiffusion:
    """Load the model of ``--model`` on ``--device``.

    Raises:
        ForgetConceptError: If the device is not available, or the model cannot be loaded.
    """
    import torch

    from .. import api

    extra = {"clip_skip": args.clip_skip, "config": args.config} if "clip_skip" in args else {}
    device = device_of(args)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"The device '{device}' is not available: {str(error).splitlines()[0]} Choose another --device."
        ) from error
    with console.progress(f"loading {args.model}"):
        return api.load_model(args.model, device=device, **extra)


def load_embedded(args: argparse.Namespace, console: Console) -> tuple[LatentDiffusion, Probe]:
    """Load the embedded model and its probe.

    Raises:
        RequestError: For any other model: the probe knows only the embedded model's vocabulary.
    """
    from ..mini import load_probe

    model = load_model(args, console)
    if model.name not in EMBEDDED:
        raise RequestError(
            f"The probe only recognizes pictures of the embedded models, so '{args.model}' cannot be measured with it: "
            f"use --model {' or '.join(EMBEDDED)}."
        )
    return model, load_probe().to(model.device)


def add_judge(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the judge in :func:`load_evaluators`."""
    parser.add_argument(
        "--clip",
        default="openai/clip-vit-base-patch32",
        metavar="NAME",
        help="CLIP model that judges the pictures of a checkpoint: a name on the Hugging Face hub, or a folder "
        "(default: openai/clip-vit-base-patch32)",
    )
    parser.add_argument(
        "--clip-weights",
        metavar="NAME",
        help="load the CLIP with open_clip: name or file of its weights; --clip is then an open_clip name",
    )


def load_evaluators(
    args: argparse.Namespace, bench: ConceptBench | None, console: Console, quality: bool = False
) -> tuple[LatentDiffusion, Evaluators]:
    """Load the model and its evaluators: the probe for the embedded model, else the CLIP of :func:`add_judge`.

    Args:
        quality: Also load what FID, KID and LPIPS need on a checkpoint; what cannot be loaded is listed as missing.

    Raises:
        ForgetConceptError: If the model or the judge cannot be loaded, or a checkpoint comes without a benchmark.
    """
    from ..evaluation.assess import Evaluators
    from ..evaluation.judges import ClipJudge
    from ..evaluation.metrics import LPIPS, ImageText, InceptionFeatures, OpenClip, TransformersClip

    if args.model in EMBEDDED:
        model, probe = load_embedded(args, console)
        return model, Evaluators.embedded(probe)
    if bench is None:
        raise RequestError(f"'{args.model}' has no vocabulary of its own to measure: name a benchmark with --bench.")
    # the judge first: it is smaller, and more likely to be missing
    device = device_of(args)
    if args.clip_weights is None and not args.clip.startswith(("local-dir:", "hf-hub:")):
        image_text: ImageText = TransformersClip(args.clip, device)
    else:
        image_text = OpenClip(args.clip, args.clip_weights, device)
    features, distance, missing = None, None, {}
    if quality:
        try:
            features, distance = InceptionFeatures(device), LPIPS(device=device)
        except ForgetConceptError as error:
            missing["metrics"] = str(error)
    judge = ClipJudge(image_text, bench.names())
    return load_model(args, console), Evaluators(judge, features, distance, image_text, missing=missing)


def device_of(args: argparse.Namespace) -> str:
    """``--device``, or else ``cuda`` if it is available, or else ``cpu``."""
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")
