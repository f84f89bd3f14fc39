"""``forget-concept forget``: make a patch that forgets one or several concepts."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError, listed
from ..mini.files import NAMES as EMBEDDED
from ..request.concept import KINDS, Concept, normalized_phrase
from ..request.request import ForgetRequest, strength_warning
from . import options
from .console import Console
from .files import check_distinct, check_patch_file

if TYPE_CHECKING:
    from ..patch.history import RequestRecord
    from ..patch.patch import Patch

_MANY = 6
HELP = "make a patch that forgets one or several concepts"
FROM_FLAGS = (
    *("concept", "theme", "kind", "replacement", "image"),
    *("preserve", "method", "preset", "set", "strength", "seed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # no argparse defaults: read_request must tell options that were given, which --request excludes, from absent ones
    parser.add_argument("--concept", action="append", metavar="NAME", help="concept to forget; repeatable")
    parser.add_argument(
        "--theme",
        metavar="NAME",
        help="forget every concept of a theme, with or without --concept; see 'forget-concept themes'",
    )
    parser.add_argument(
        "--kind",
        action="append",
        choices=KINDS,
        help="kind of the concepts: once for all, or once for each, in order (default: the kind in the embedded "
        "model's vocabulary, else object)",
    )
    parser.add_argument(
        "--replacement",
        action="append",
        metavar="WORDS",
        help="replacement to show in place of the concepts: once for all, or once for each (default: none)",
    )
    parser.add_argument(
        "--image",
        action="append",
        metavar="NAME=PATH",
        help="a picture, or a folder of pictures, of the concept NAME, for methods that use reference images; "
        "repeatable (with one concept, PATH alone is enough)",
    )
    parser.add_argument("--preserve", action="append", metavar="WORDS", help="concept of the retain set; repeatable")
    parser.add_argument("--method", help="method; see 'forget-concept methods' (default: uce)")
    parser.add_argument("--preset", help="preset of the method: published or tuned (default: tuned)")
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="override one setting of the method; VALUE is JSON or text; see 'forget-concept methods METHOD'",
    )
    parser.add_argument("--strength", type=options.finite, help="scale of the edit, above 0 and up to 10 (default: 1)")
    parser.add_argument("--seed", type=options.whole(), help="random seed of methods that sample (default: 0)")
    parser.add_argument("--request", metavar="FILE", type=Path, help="read all of the above from a JSON file")
    parser.add_argument(
        "--onto",
        metavar="PATCH",
        help="continue from an earlier patch of the same model: the new patch forgets both",
    )
    parser.add_argument(
        "--max-rank",
        type=options.whole(1),
        metavar="N",
        help="with --onto, upper bound of the whole patch's rank; a truncated request can no longer be restored",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="patch file to write (default: forget-<concepts>.safetensors)"
    )
    parser.add_argument(
        "--context-map", metavar="FILE", type=Path, help="also write the edit as a context map, its most compact form"
    )
    parser.add_argument(
        "--work",
        metavar="DIR",
        type=Path,
        help="cache pictures, Fisher information and training state in this folder; the same command resumes from it",
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="dtype of the file (default: fp32)")
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

    # reject invalid input before a model is loaded
    plan = plan_request(read_request(args))
    request = plan.request
    all_concepts = request.concepts
    if args.onto is not None:
        record = read_history(read_metadata(args.onto))
        next_record(record.parts, plan)
        all_concepts = record.concepts + all_concepts
    elif args.max_rank is not None:
        raise RequestError(
            "--max-rank bounds the rank of a patch of several requests: give --onto, or --set the method's own rank."
        )
    out = check_patch_file(args.out or Path(f"forget-{file_stem(ForgetRequest(all_concepts))}.safetensors"))
    if args.context_map is not None:
        check_patch_file(args.context_map)
    pictures = {f"'{path}'": path for concept in request.concepts for path in concept.images}
    check_distinct({"--out": out, "--context-map": args.context_map}, {"--request": args.request, **pictures})
    # a patch may be continued in place
    check_distinct({"--context-map": args.context_map}, {"--onto": args.onto})
    if (warning := strength_warning(request.strength)) is not None:
        console.note(f"warning: {warning}")
    model = options.load_model(args, console)
    began = time.perf_counter()
    with console.progress(f"forgetting {concepts_text(request)}") as progress:
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
    if args.context_map is not None and not patch.context_maps:
        raise RequestError(f"The method '{patch.about.method}' produces no context map: leave out --context-map.")
    kohya.save(patch, out, model.survey, dtype)
    if args.context_map is not None:
        context_map.save(patch, args.context_map, dtype=dtype)
    console.say(f"Forgot {concepts_text(request)} with {request.method} ({request.preset}) in {seconds:.2f} s.")
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
    """The ``--json`` output for a new patch."""
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
    """The ``--json`` output for the requests of a patch."""
    return [{"number": record.number, "request": json.loads(record.request.to_json())} for record in records]


def read_request(args: argparse.Namespace) -> ForgetRequest:
    """Read the request from ``--request`` or from the separate options.

    Raises:
        RequestError: If both or neither are given, or the request is invalid.
    """
    given = [name for name in FROM_FLAGS if getattr(args, name) is not None]
    if args.request is not None:
        if given:
            raise RequestError(
                f"--request and --{given[0]} exclude each other: leave out --{given[0]}, or write it into the file."
            )
        return ForgetRequest.from_file(args.request)
    if not args.concept and args.theme is None:
        raise RequestError("Nothing to forget: give --concept NAME, --theme NAME or --request FILE.")
    names = args.concept or []
    if args.theme is not None and not names and len(args.replacement or ()) > 1:
        raise RequestError("A theme has one replacement for all of its concepts: give --replacement once.")
    if args.kind and not names:
        raise RequestError("The list of a theme states the kinds of its concepts: leave out --kind.")
    if args.image and not names:
        raise RequestError("Pictures are of a concept that is named: give --concept NAME, or leave out --image.")
    kinds = _each("--kind", args.kind, names)
    replacements = _each("--replacement", args.replacement, names)
    images = _images(args.image or (), names)
    concepts = tuple(
        Concept(name, kind or default_kind(name, args.model), replacement, images.get(name, ()))
        for name, kind, replacement in zip(names, kinds, replacements, strict=True)
    )
    shared = args.replacement[0] if args.theme is not None and len(args.replacement or ()) == 1 else None
    return ForgetRequest(
        concepts,
        preserve=tuple(args.preserve or ()),
        method=args.method if args.method is not None else "uce",
        preset=args.preset if args.preset is not None else "tuned",
        settings=dict(map(setting, args.set or ())),
        strength=1.0 if args.strength is None else args.strength,
        seed=args.seed or 0,
        theme=args.theme,
        theme_replacement=shared,
    )


def _each(option: str, values: list[str] | None, concepts: list[str]) -> list[str | None]:
    """Expand an option to one value per concept."""
    if not values or not concepts:
        return [None] * len(concepts)
    if len(values) == 1:
        return values * len(concepts)  # type: ignore[return-value]
    if len(values) != len(concepts):
        raise RequestError(
            f"There are {len(concepts)} concepts but {len(values)} {option} options: give it once for all, or once for "
            "each concept."
        )
    return list(values)


def _images(given: Sequence[str], concepts: list[str]) -> dict[str, tuple[str, ...]]:
    """Read ``NAME=PATH`` options (``PATH`` with one concept): paths of pictures by concept."""
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
    """The kind of a concept given without one: as in the embedded model's vocabulary, else ``object``."""
    if model in EMBEDDED:
        from ..mini.vocabulary import CATEGORIES

        for kind, words in CATEGORIES.items():
            if any(normalized_phrase(word.name) == normalized_phrase(name) for word in words):
                return kind
    return "object"


def setting(text: str) -> tuple[str, Any]:
    """Parse ``NAME=VALUE``; a value that is not valid JSON is taken as text."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise RequestError(f"'--set {text}' is not of the form NAME=VALUE.")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), value


def concepts_text(request: ForgetRequest) -> str:
    """The concepts and replacements of a request, for a sentence."""
    shown = [f"'{c.name}'" + (f" (replaced by '{c.replacement}')" if c.replacement else "") for c in request.concepts]
    return " and ".join(shown) if len(shown) <= _MANY else listed(shown, _MANY)


def file_stem(request: ForgetRequest) -> str:
    """The concepts of a request, for a file name."""
    words = "-".join(concept.name for concept in request.concepts[:3])
    more = len(request.concepts) - 3
    named = re.sub(r"[^a-z0-9]+", "-", words.casefold()).strip("-")[:60] or "concept"
    return named + (f"-and-{more}-more" if more > 0 else "")
