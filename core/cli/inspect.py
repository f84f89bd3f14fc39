"""``forget-concept inspect``: show the contents of a patch file, and whether it fits a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PatchError, UnsupportedAdapterError
from ..files.json_text import parse_json
from . import options
from .console import Console
from .forget import concepts_text

if TYPE_CHECKING:
    from ..formats.contents import Contents
    from ..patch.low_rank import LowRank
    from ..patch.patch import Patch

HELP = "show the contents of a patch and, with --model, whether it fits the model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a patch (.safetensors)")
    parser.add_argument("--model", help="a model to check the patch against (as for 'forget')")
    parser.add_argument("--device", help="device to load the model on")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from ..files.safetensors_io import read_safetensors
    from ..formats import context_map, kohya, load_patch
    from ..formats.contents import contents_of, dtype_name
    from ..patch.metadata import PatchMetadata, own_entries

    tensors, raw = read_safetensors(args.file)
    kind = "context_map" if PatchMetadata.from_strings(raw).format == context_map.FORMAT else "lora"
    factors: dict[str, LowRank]
    if kind == "context_map":
        factors = context_map.load(args.file)[0]
    else:
        try:
            factors = dict(kohya.from_state(tensors, raw, None, str(args.file)).factors)
        except UnsupportedAdapterError:
            if args.model:
                raise
            return _unsupported(args.file, contents_of(tensors, raw, None, str(args.file)), console)
    about = {name: _value(text) for name, text in own_entries(raw).items()}
    data: dict[str, Any] = {
        "schema": 1,
        "file": str(args.file),
        "kind": kind,
        "bytes": Path(args.file).stat().st_size,
        "layers": len(factors),
        "rank": max(factor.rank for factor in factors.values()),
        "dtype": dtype_name(tensors),
        "metadata": about,
        "fit": None,
        "why_not": None,
    }
    console.say(f"{args.file}: {'context map' if kind == 'context_map' else 'LoRA'}, {data['bytes']:,} bytes")
    if kind == "lora":
        shapes = sorted({factor.shape for factor in factors.values()})
        sizes = ", ".join(f"{rows}×{columns}" for rows, columns in shapes)
        console.say(f"{data['layers']} layers of rank up to {data['rank']}, {data['dtype']}, on weights {sizes}")
    if not about:
        console.say("It has no record of how it was made: it was not written by this program.")
    record = about.get("history")
    for name, value in sorted(about.items()):
        if name == "history":
            continue
        console.say(f"  {name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    if record is not None:
        _show_history(raw, console)
    if args.model:
        model = options.load_model(args, console)
        patch = load_patch(args.file, model.survey)
        patch.check_fits(model.survey)
        data["fit"] = _fit(patch, model, about, args.model, console)
    return data


def _unsupported(file: str, contents: Contents, console: Console) -> dict[str, Any]:
    """Print what an adapter holds that cannot be applied, and why."""
    from ..service.summaries import contents_summary

    size = Path(file).stat().st_size
    console.say(f"{file}: {size:,} bytes")
    for line in contents_summary(contents):
        console.say(line)
    return {
        "schema": 1,
        "file": str(file),
        "kind": "unsupported",
        "bytes": size,
        "layers": contents.layers,
        "rank": max(contents.ranks, default=None),
        "dtype": contents.dtype,
        "metadata": {},
        "fit": None,
        "why_not": contents.why_not,
        "kinds": dict(contents.kinds),
        "places": dict(contents.places),
        "ranks": list(contents.ranks),
    }


def _show_history(metadata: Mapping[str, str], console: Console) -> None:
    """Print the requests that made a patch, in order, and which of them can be restored."""
    from ..methods.sequence_rules import is_closed_form
    from ..patch.history import read_history

    try:
        record = read_history(metadata)
    except PatchError as error:
        console.say(f"  {error}")
        return
    console.say("It was made by these requests, in this order:")
    for entry in record.records:
        part = next(part for part in record.parts if entry in part.records)
        how = f"rank up to {max(part.ranks.values(), default=0)}"
        if part.merged:
            how = "truncated together with others, so it cannot be taken back"
        elif is_closed_form(entry.request.method) and len(part.records) > 1:
            how = "solved jointly with the others of its method"
        console.say(
            f"  {entry.number}. {concepts_text(entry.request)}: {entry.request.method} ({entry.request.preset}), {how}"
        )


def _fit(patch: Patch, model: Any, about: dict[str, Any], name: str, console: Console) -> dict[str, Any]:
    """Print how much of the edit survives merging into a model that it fits, and whether it was made on that model."""
    import torch

    shares = {
        str(d).removeprefix("torch."): patch.surviving_share(model.survey, d) for d in (torch.float16, torch.bfloat16)
    }
    same = about.get("base_model") == model.model_hash if "base_model" in about else None
    console.say(f"It fits {name}: the model has every layer of the patch.")
    for dtype, share in shares.items():
        warning = " (most of the edit is rounded away: keep it as a LoRA)" if share < 0.5 else ""
        console.say(f"  merged into {dtype} weights, {100 * share:.1f} % of the edit survives{warning}")
    if same is not None:
        words = "this is the model it was made on" if same else "it was made on another model of this kind"
        console.say(f"  {words}")
    return {"model": name, "surviving_share": shares, "same_base": same}


def _value(text: str) -> Any:
    """A metadata entry, decoded if it is a JSON object or list."""
    if text[:1] in ("{", "["):
        try:
            return parse_json(text)
        except ValueError:
            return text
    return text
