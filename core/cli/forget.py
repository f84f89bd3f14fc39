"""``forget-concept forget``: words in, a patch out."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..request.concept import KINDS, Concept, normalized_phrase
from ..request.request import ForgetRequest
from . import options
from .console import Console
from .files import check_writable

if TYPE_CHECKING:
    from ..patch.history import RequestRecord
    from ..patch.patch import Patch

HELP = "make a patch that forgets one or several concepts"
FROM_FLAGS = ("concept", "kind", "replacement", "image", "preserve", "method", "preset", "set", "strength", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # no defaults here: what is given must be told from what is not, beside --request
    parser.add_argument("--concept", action="append", metavar="NAME", help="what to forget; may be given several times")
    parser.add_argument(
        "--kind",
        action="append",
        choices=KINDS,
        help="of the concepts: once for all, or once for each in their order (default: object, or what the embedded "
        "model's world says)",
    )
    parser.add_argument(
        "--replacement", action="append", metavar="WORDS", help="what to show instead: once for all, or once for each"
    )
    parser.add_argument(
        "--image",
        action="append",
        metavar="NAME=PATH",
        help="a picture of the concept NAME, or a folder of them, for methods that look at some; may be given several "
        "times (with one concept, PATH alone is enough)",
    )
    parser.add_argument(
        "--preserve", action="append", metavar="WORDS", help="what must stay; may be given several times"
    )
    parser.add_argument("--method", help="see 'forget-concept methods' (default: uce)")
    parser.add_argument("--preset", help="published or tuned (default: tuned)")
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="one setting of the method, its value as JSON or words; 'forget-concept methods METHOD' explains them",
    )
    parser.add_argument("--strength", type=options.finite, help="of the edit, above 0 and up to 10 (default: 1)")
    parser.add_argument("--seed", type=options.whole(), help="for methods that draw (default: 0)")
    parser.add_argument("--request", metavar="FILE", type=Path, help="all of the above as a JSON file instead")
    parser.add_argument(
        "--onto",
        metavar="PATCH",
        help="start from what an earlier patch of the same model forgot: the new one holds both",
    )
    parser.add_argument(
        "--max-rank",
        type=options.whole(1),
        metavar="N",
        help="with --onto, a bound of the whole patch's rank; where it cuts, nothing can be restored from it any more",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="the patch (default: forget-<concepts>.safetensors)")
    parser.add_argument(
        "--context-map", metavar="FILE", type=Path, help="also write the edit as a context map, its smallest form"
    )
    parser.add_argument(
        "--work",
        metavar="DIR",
        type=Path,
        help="a folder for what takes long (pictures, Fisher information, a training cut short): the same command goes "
        "on from there",
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the file (default: fp32)")
    options.add_model(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    import torch

    from ..files.safetensors_io import read_metadata
    from ..files.workspace import Workspace
    from ..formats import context_map, kohya, load_patch
    from ..methods.base import Inputs
    from ..methods.fit import fit
    from ..methods.registry import plan_request
    from ..methods.sequence import History
    from ..methods.sequence_rules import next_record
    from ..patch.history import read_history

    request = read_request(args)
    # what can be refused is refused before a model is loaded
    plan = plan_request(request)
    together = request.concepts
    if args.onto is not None:
        record = read_history(read_metadata(args.onto))
        next_record(record.parts, plan)
        together = record.concepts + together
    elif args.max_rank is not None:
        raise RequestError("--max-rank bounds a patch of several requests: give --onto, or set the method's own rank.")
    out = check_writable(args.out or Path(f"forget-{slug(ForgetRequest(together))}.safetensors"))
    if args.context_map is not None:
        check_writable(args.context_map)
    model = options.load_model(args, console)
    began = time.perf_counter()
    with console.progress(f"forgetting {spoken(request)}") as progress:
        inputs = Inputs(workspace=None if args.work is None else Workspace(args.work))
        if args.onto is None:
            records, patch = None, fit(model, plan, progress, inputs)
        else:
            history = History.from_patch(load_patch(args.onto, model.survey))
            bound = history.max_rank if args.max_rank is None else args.max_rank
            history = history.bounded(bound).forget(model, plan, progress, inputs)
            records, patch = history.records, history.patch
    seconds = time.perf_counter() - began
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[args.dtype]
    if args.context_map is not None and patch.context_map is None:
        raise RequestError(f"The method '{patch.about.method}' gives no context map: leave --context-map out.")
    kohya.save(patch, out, model.survey, dtype)
    if args.context_map is not None:
        context_map.save(patch, args.context_map, dtype)
    console.say(f"Forgot {spoken(request)} with {request.method} ({request.preset}) in {seconds:.2f} s.")
    console.say(f"{out}: {len(patch)} layers, rank {patch.rank}, {out.stat().st_size:,} bytes")
    if args.context_map is not None:
        console.say(f"{args.context_map}: context map, {args.context_map.stat().st_size:,} bytes")
    if records is not None:
        console.say(f"It holds {len(records)} requests: {', '.join(record.names for record in records)}.")
    return (
        summary(request, patch, out, seconds)
        | {"context_map": None if args.context_map is None else str(args.context_map)}
        | ({} if records is None else {"requests": requests_to_dict(records)})
    )


def summary(request: ForgetRequest, patch: Patch, out: Path, seconds: float) -> dict[str, Any]:
    """What ``--json`` says of a new patch."""
    return {
        "schema": 1,
        "patch": str(out),
        "request": json.loads(request.to_json()),
        "layers": len(patch),
        "rank": patch.rank,
        "bytes": out.stat().st_size,
        "seconds": seconds,
    }


def requests_to_dict(records: Sequence[RequestRecord]) -> list[dict[str, Any]]:
    """What ``--json`` prints about the requests of a patch."""
    return [{"number": record.number, "request": json.loads(record.request.to_json())} for record in records]


def read_request(args: argparse.Namespace) -> ForgetRequest:
    """The request of ``--request`` or of the single options. Raises :class:`RequestError` where both are given."""
    given = [name for name in FROM_FLAGS if getattr(args, name) is not None]
    if args.request is not None:
        if given:
            raise RequestError(f"--request says everything: leave --{given[0]} out, or write it into the file.")
        return ForgetRequest.from_file(args.request)
    if not args.concept:
        raise RequestError("Nothing to forget: give --concept NAME or --request FILE.")
    kinds = _each("--kind", args.kind, args.concept)
    replacements = _each("--replacement", args.replacement, args.concept)
    images = _images(args.image or (), args.concept)
    concepts = tuple(
        Concept(name, kind or default_kind(name, args.model), replacement, images.get(name, ()))
        for name, kind, replacement in zip(args.concept, kinds, replacements, strict=True)
    )
    return ForgetRequest(
        concepts,
        preserve=tuple(args.preserve or ()),
        method=args.method if args.method is not None else "uce",
        preset=args.preset if args.preset is not None else "tuned",
        settings=dict(map(setting, args.set or ())),
        strength=1.0 if args.strength is None else args.strength,
        seed=args.seed or 0,
    )


def _each(option: str, values: list[str] | None, concepts: list[str]) -> list[str | None]:
    """An option's value for each concept: none, the one for all, or one each."""
    if not values:
        return [None] * len(concepts)
    if len(values) == 1:
        return values * len(concepts)  # type: ignore[return-value]
    if len(values) != len(concepts):
        raise RequestError(
            f"There are {len(concepts)} concepts and {len(values)} times {option}: give it once for all or once each."
        )
    return list(values)


def _images(given: Sequence[str], concepts: list[str]) -> dict[str, tuple[str, ...]]:
    """``NAME=PATH`` or, with one concept, ``PATH``: the pictures' places by concept."""
    found: dict[str, tuple[str, ...]] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if len(concepts) == 1 and (not equals or name != concepts[0]):
            name, path = concepts[0], text
        if name not in concepts or not path.strip():
            raise RequestError(f"'--image {text}' is not of the form NAME=PATH with one of {', '.join(concepts)}.")
        found[name] = (*found.get(name, ()), path)
    return found


def default_kind(name: str, model: str) -> str:
    """The kind of a concept that none was given for: the embedded model's world knows its own, else an object."""
    if model == "mini":
        from ..mini.vocabulary import CATEGORIES

        for kind, words in CATEGORIES.items():
            if any(normalized_phrase(word.name) == normalized_phrase(name) for word in words):
                return kind
    return "object"


def setting(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``: the value as JSON where it is some, else as words."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise RequestError(f"'--set {text}' is not of the form NAME=VALUE.")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), value


def spoken(request: ForgetRequest) -> str:
    """The concepts as they stand in a sentence."""
    return " and ".join(
        f"'{c.name}'" + (f" (showing '{c.replacement}' instead)" if c.replacement else "") for c in request.concepts
    )


def slug(request: ForgetRequest) -> str:
    """The concepts as they stand in a file's name."""
    words = "-".join(concept.name for concept in request.concepts[:3])
    more = len(request.concepts) - 3
    named = re.sub(r"[^a-z0-9]+", "-", words.casefold()).strip("-")[:60] or "concept"
    return named + (f"-and-{more}-more" if more > 0 else "")
