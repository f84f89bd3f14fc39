"""Untrusted files and texts, made by structure-aware mutation, against everything that reads them.

Run as a program for long runs: ``python tests/fuzz.py KIND --count N [--seed S]``; prints what was found. A finding is
an exception that is not the project's own sentence, a read that takes more than two seconds, or a file that must be
refused and was not. Every case is a function of its kind, seed and number.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import os
import random
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forget_concept.core.errors import ForgetConceptError

SLOW = 2.0  # seconds of processor time
SITE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
FLAT = "lora_unet_" + SITE.replace(".", "_")


@dataclass(frozen=True)
class Case:
    """What is read, and whether it must be refused."""

    data: bytes
    refuse: bool
    about: str


# -- values -------------------------------------------------------------------------------------------------------

HOSTILE_TEXTS = (
    "",
    " ",
    "\ud800",
    "\x00",
    "\x1b[31mred",
    "a" * 5000,
    "[" * 5000,
    "{}",
    "null",
    "\u202e",
    "../x",
    "%s{}",
)
HOSTILE_NUMBERS = (0, -1, 1, 2, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e308, True, None)
# values that no JSON writer makes, as text
RAW = ("1e999", "-1e999", "NaN", "Infinity", "1" * 5000, '"\\ud800"', "[" * 3000 + "]" * 3000, "01", "'x'", "1e", '"')


def hostile(rng: random.Random) -> Any:
    """A value that a reader may not expect."""
    return rng.choice(
        (
            lambda: rng.choice(HOSTILE_TEXTS),
            lambda: rng.choice(HOSTILE_NUMBERS),
            list,
            dict,
            lambda: [rng.choice(HOSTILE_NUMBERS) for _ in range(rng.randrange(4))],
            lambda: {rng.choice(HOSTILE_TEXTS): rng.choice(HOSTILE_NUMBERS)},
        )
    )()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a JSON value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from places(value[index], (*path, index))


def mutated(document: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to three of its values replaced, removed, renamed or doubled."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.randint(1, 3)):
        found = list(places(document))[1:]
        if not found:
            return hostile(rng)
        *inside, last = rng.choice(found)
        parent = document
        for step in inside:
            parent = parent[step]
        action = rng.randrange(4)
        if action == 0:
            del parent[last]
        elif action == 1 and isinstance(parent, dict):
            parent[rng.choice(HOSTILE_TEXTS)] = parent.pop(last)
        elif action == 2 and isinstance(parent, list):
            parent += [parent[last]] * rng.randint(1, 3)
        else:
            parent[last] = hostile(rng)
    return document


def as_text(document: Any, rng: random.Random) -> bytes:
    """JSON of a value, sometimes with what no JSON writer makes in it, sometimes damaged."""
    text = json.dumps(document)
    roll = rng.random()
    if roll < 0.2:
        marks = [i for i, sign in enumerate(text) if sign in ",:"]
        if marks:
            at = rng.choice(marks) + 1
            end = next((i for i in range(at, len(text)) if text[i] in ",}]"), len(text))
            text = text[:at] + rng.choice(RAW) + text[end:]
    data = text.encode()
    return damaged(data, rng) if roll > 0.85 else data


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few of them flipped, cut off, or doubled."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not found:
            break
        at = rng.randrange(len(found))
        action = rng.randrange(4)
        if action == 0:
            found[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del found[at:]
        elif action == 2:
            found[at:at] = found[at : at + rng.randrange(1, 40)]
        else:
            found[at] = rng.choice((0, 0xFF, 0x22, 0x5B, 0x7B))
    return bytes(found)


# -- patch files --------------------------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes) -> bytes:
    """The bytes of a file with a header, which may be text already."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _tensor(rng: random.Random, shape: tuple[int, ...]) -> bytes:
    count = 1
    for side in shape:
        count *= side
    return struct.pack(f"<{count}f", *(rng.uniform(-1, 1) for _ in range(count)))


def _sound(rng: random.Random) -> tuple[dict[str, Any], bytes]:
    """Header and data of a small patch that loads."""
    rank, rows, columns = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 4)
    parts = {
        f"{FLAT}_to_k.lora_up.weight": (rows, rank),
        f"{FLAT}_to_k.lora_down.weight": (rank, columns),
        f"{FLAT}_to_k.alpha": (),
    }
    request = {"schema": 1, "concepts": [{"name": "star", "kind": "object", "replacement": "circle"}]}
    metadata = {
        "forget_concept.method": "uce",
        "forget_concept.request": json.dumps(request),
        "forget_concept.settings": json.dumps({"ridge": 0.1}),
        "forget_concept.strength": "1.0",
        "forget_concept.seed": "0",
        "forget_concept.family": "sd1",
        "forget_concept.history": json.dumps({"schema": 1, "max_rank": None, "parts": []}),
        "forget_concept.parts": json.dumps([{"strength": 1.0, "metadata": {"forget_concept.method": "uce"}}]),
        "lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_k": 2}}),
    }
    kept = {name: text for name, text in metadata.items() if rng.random() < 0.6}
    header: dict[str, Any] = {"__metadata__": {"forget_concept.method": "uce", **kept}}
    data = b""
    for name, shape in parts.items():
        more = _tensor(rng, shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + len(more)]}
        data += more
    return header, data


_DTYPES = (
    *("BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64", "C64", "XX", ""),
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3"),
)


def _must_refuse(rng: random.Random) -> Case:
    """A patch with a fault that must not pass."""
    header, data = _sound(rng)
    up, down, _ = (name for name in header if name != "__metadata__")
    first, last = header[up]["data_offsets"]
    kind = rng.randrange(9)
    if kind == 0:  # a factor whose values are no real numbers
        header[up]["dtype"] = rng.choice(("I32", "U32"))
    elif kind == 1:  # a value that is not finite
        at = first + 4 * rng.randrange((last - first) // 4)
        data = data[:at] + struct.pack("<f", rng.choice((float("nan"), float("inf")))) + data[at + 4 :]
    elif kind == 2:  # zeros alone
        data = bytes(last) + data[last:]
    elif kind == 3:  # alpha 0
        data = data[:-4] + bytes(4)
    elif kind == 4:
        header["__metadata__"]["forget_concept.format"] = rng.choice(("context_map_v2", "context_map", "x"))
    elif kind == 5:
        del header[rng.choice((up, down))]
        return Case(safetensors(header, data), True, "a part is missing")
    elif kind == 6:
        data = data[: rng.randrange(len(data))]
    elif kind == 7:
        header[up]["data_offsets"][1] = rng.choice((1e999, -1, 2**64, "4", None, [], True))
    else:  # a factor of complex numbers
        rows, rank = header[up]["shape"]
        if (rows * rank) % 2:
            return Case(safetensors(header, data[:-1]), True, "cut off")
        header[up] |= {"dtype": "C64", "shape": [rows * rank // 2, 1]}
    return Case(safetensors(json.dumps(header).encode(), data), True, f"fault {kind}")


def patch_case(rng: random.Random) -> Case:
    """A patch file."""
    if rng.random() < 0.25:
        return _must_refuse(rng)
    header, data = _sound(rng)
    roll = rng.random()
    if roll < 0.3:
        metadata = header["__metadata__"]
        name = rng.choice(sorted(metadata))
        text = metadata[name]
        try:
            document = json.loads(text)
        except ValueError:
            document = text
        metadata[name] = as_text(mutated(document, rng), rng).decode("utf-8", "replace")
    elif roll < 0.5:
        one = header[rng.choice([name for name in header if name != "__metadata__"])]
        what = rng.choice(("dtype", "shape", "data_offsets"))
        one[what] = rng.choice(_DTYPES) if what == "dtype" else mutated(one[what], rng)
    elif roll < 0.7:
        return Case(safetensors(as_text(mutated(header, rng), rng), data), False, "header")
    elif roll < 0.8:
        name = rng.choice([name for name in header if name != "__metadata__"])
        other = rng.choice((name.replace("lora_up", "hada_w1_a"), name + ".x", "", "\x00", "../" + name, name.upper()))
        header[other] = header.pop(name)
    else:
        return Case(damaged(safetensors(header, data), rng), False, "bytes")
    return Case(safetensors(header, data), False, "structure")


def read_patch(path: Path) -> None:
    """Everything that a host does with a file in its LoRA folder."""
    from forget_concept.core.errors import PatchError
    from forget_concept.core.files.safetensors_io import read_metadata, read_safetensors
    from forget_concept.core.formats import load_patch
    from forget_concept.core.formats.contents import contents_of
    from forget_concept.core.patch.history import read_history
    from forget_concept.core.service.patch_library import PatchLibrary
    from forget_concept.core.service.summaries import contents_summary, patch_summary

    library = PatchLibrary(lambda: path.parent)
    json.dumps([entry.as_dict() for entry in library.entries()], allow_nan=False).encode()
    json.dumps(library.unreadable()).encode()
    for work in (
        lambda: json.dumps(library.inspect(path.stem), allow_nan=False).encode(),
        lambda: contents_summary(contents_of(*read_safetensors(path))),
        lambda: read_history(read_metadata(path)),
    ):
        with contextlib.suppress(PatchError):
            work()
    patch_summary(load_patch(path)).encode()


# -- texts --------------------------------------------------------------------------------------------------------

REQUEST = {
    "schema": 1,
    "concepts": [{"name": "star", "kind": "object", "replacement": "circle", "images": []}, {"name": "neon"}],
    "preserve": ["moon", "heart"],
    "method": "uce",
    "preset": "tuned",
    "settings": {"ridge": 0.1, "projections": ["to_k"]},
    "strength": 1.0,
    "seed": 3,
}
BENCH = {
    "name": "b",
    "licence": "CC0",
    "description": "d",
    "concepts": [
        {
            "name": "star",
            "category": "object",
            "prompts": {
                "plain": ["a star"],
                "compositional": ["a red star"],
                "paraphrased": ["a pentagram"],
                "indirect": ["night sky"],
            },
            "synonyms": ["pentagram"],
            "neighbours": ["moon"],
            "replacement": "circle",
        }
    ],
}


def request_case(rng: random.Random) -> Case:
    """A request, or a setting, a list of concepts or a theme."""
    return Case(as_text(mutated(REQUEST, rng), rng), False, "request")


def read_request(path: Path) -> None:
    from forget_concept.core.methods.registry import plan_request
    from forget_concept.core.request.request import ForgetRequest

    plan_request(ForgetRequest.from_file(path)).request.to_json().encode()


def bench_case(rng: random.Random) -> Case:
    """A benchmark file."""
    return Case(as_text(mutated(BENCH, rng), rng), False, "benchmark")


def read_bench(path: Path) -> None:
    from forget_concept.core.evaluation.bench.concept_bench import ConceptBench

    ConceptBench.from_file(path).digest.encode()


@functools.cache
def _bomb(size: int) -> bytes:
    return zlib.compress(bytes(size))


def _png(rng: random.Random) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    size = (rng.choice((1, 16, 130)), rng.choice((1, 16, 130)))
    Image.new(rng.choice(("RGB", "RGBA", "L", "P", "I;16", "1")), size).save(stream, "PNG")
    return stream.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def picture_case(rng: random.Random) -> Case:
    """A picture: damaged, or with a chunk that unpacks to far more than it is."""
    data = _png(rng)
    if rng.random() < 0.5:
        bomb = _bomb(rng.choice((10, 2**21, 2**26)))
        name, content = rng.choice(
            (
                (b"zTXt", b"Comment\0\0" + bomb),
                (b"iCCP", b"icc\0\0" + bomb),
                (b"iTXt", b"x\0\1\0\0\0" + bomb),
                (b"IHDR", data[16 : 16 + rng.randrange(13)]),
                (b"IHDR", struct.pack(">II", 2**31 - 1, 2**31 - 1) + b"\x08\x02\0\0\0"),
                (b"tRNS", b""),
                (b"PLTE", b"xx"),
                (b"gAMA", b""),
                (b"pHYs", b"x"),
                (b"eXIf", b"MM\0*\xff\xff\xff\xff"),
            )
        )
        data = data[:33] + _chunk(name, content) + data[33:] if name != b"IHDR" else data[:8] + _chunk(name, content)
    else:
        data = damaged(data, rng)
    return Case(data, False, "picture")


def read_picture(path: Path) -> None:
    import base64

    from forget_concept.core.models.images import load_images
    from forget_concept.core.service.html import _thumbnail
    from forget_concept.core.service.uploads import Uploads

    data = path.read_bytes()
    _thumbnail(path, zlib.crc32(data))
    with contextlib.suppress(ForgetConceptError):
        Uploads({0: [base64.b64encode(data).decode()]}).remove()
    load_images([path], (16, 16))


def map_case(rng: random.Random) -> Case:
    """A context map."""
    width, rank = rng.randint(1, 4), rng.randint(1, 3)
    header: dict[str, Any] = {"__metadata__": {"forget_concept.format": "context_map", "forget_concept.method": "uce"}}
    data = b""
    for name, shape in (("context_map.up", (width, rank)), ("context_map.down", (rank, width))):
        more = _tensor(rng, shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + len(more)]}
        data += more
    roll = rng.random()
    if roll < 0.4:
        return Case(safetensors(as_text(mutated(header, rng), rng), data), False, "header")
    if roll < 0.5:
        header["context_map.up"]["shape"] = header["context_map.up"]["shape"][::-1]
        return Case(safetensors(header, data), False, "shape")
    if roll < 0.7:
        at = 4 * rng.randrange(len(data) // 4)
        data = data[:at] + struct.pack("<f", float("nan")) + data[at + 4 :]
        return Case(safetensors(header, data), True, "a value that is not finite")
    return Case(damaged(safetensors(header, data), rng), False, "bytes")


def read_map(path: Path) -> None:
    from forget_concept.core.formats import context_map

    context_map.load(path)


def work_case(rng: random.Random) -> Case:
    """A file of a work folder, sometimes with a checksum that fits what is in it."""
    import torch
    from safetensors.torch import save

    from forget_concept.core.files.workspace import key_of

    names = [name for name in ("latents", "done", "generator", "parameter.0") if rng.random() < 0.7]
    tensors = {
        name: torch.tensor(rng.choice((0, 1, -5, 10**9)))
        if rng.random() < 0.3
        else torch.full([rng.randrange(4) for _ in range(rng.randrange(5))], rng.uniform(-1, 1))
        for name in names
    }
    metadata = {"checksum": key_of(tensors) if rng.random() < 0.7 else "0"}
    data = save(tensors, metadata)
    return Case(damaged(data, rng) if rng.random() < 0.5 else data, False, "work folder")


def read_work(path: Path) -> None:
    from forget_concept.core.files.workspace import Workspace

    work = Workspace(path.parent / "work")
    place = work.path("pictures", "x")
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(path.read_bytes())
    work.metadata("pictures", "x")
    found = work.load("pictures", "x", {"latents": (None, 4), "done": ()})
    assert found is None or (found["latents"].shape[1] == 4 and found["done"].ndim == 0)
    assert (found is None) != place.exists()


RESULTS = {
    "schema": 1,
    "settings": {"model": "m", "count": 3},
}


def results_case(rng: random.Random) -> Case:
    """A file of a benchmark's results, begun by an earlier run."""
    score = {"value": 0.5, "low": 0.1, "high": 0.9, "n": 10}
    row = {"concept": "star", "variant": "p", "category": "object", "drift": 0.1, "scores": {"ua": score}}
    lines = [as_text(mutated(RESULTS, rng) if rng.random() < 0.5 else RESULTS, rng)]
    lines += [as_text(mutated(row, rng) if rng.random() < 0.7 else row, rng) for _ in range(rng.randrange(3))]
    return Case(b"\n".join(lines) + rng.choice((b"", b"\n")), False, "results")


def read_results(path: Path) -> None:
    from forget_concept.core.evaluation.bench.results import BenchResults, read_settings

    read_settings(path)
    BenchResults(path, RESULTS["settings"])


def results_table_case(rng: random.Random) -> Case:
    """A table of a benchmark's results, begun by an earlier run."""
    import csv

    from forget_concept.core.evaluation.bench.results import _COLUMNS

    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(_COLUMNS if rng.random() < 0.9 else [rng.choice(HOSTILE_TEXTS[3:]) for _ in range(3)])
    refuse = False
    for _ in range(rng.randrange(1, 4)):
        cells = ["star" if name in ("concept", "category", "variant") else "1" for name in _COLUMNS]
        cells[-1] = json.dumps(RESULTS["settings"]) if rng.random() < 0.8 else as_text(RESULTS, rng).decode("latin1")
        if rng.random() < 0.5:
            odd = rng.choice(("nan", "inf", "1e999", "-1", "x" * 200_000, *HOSTILE_TEXTS[2:]))
            cells[rng.randrange(len(cells))] = odd
            refuse |= odd in ("nan", "inf", "1e999") and any(odd == cell for cell in cells[3:])
        writer.writerow(cells)
    data = table.getvalue().encode("utf-8", "replace")
    if rng.random() < 0.2:
        return Case(damaged(data, rng), False, "results in a table")
    return Case(data, refuse, "a number that is not finite" if refuse else "results in a table")


def read_results_table(path: Path) -> None:
    from forget_concept.core.evaluation.bench.results import BenchResults, read_settings

    read_settings(path)
    for row in BenchResults(path, RESULTS["settings"]).rows:
        for number in (row.drift, *(x for s in row.scores.values() if s for x in (s.value, s.low, s.high))):
            assert math.isfinite(number)


# -- what a work folder remembers of expensive measurements -------------------------------------------------------


def _kept(tensors: dict[str, Any], rng: random.Random, **metadata: str) -> bytes:
    """A file of a work folder, mostly with the checksum of what is in it."""
    from safetensors.torch import save

    from forget_concept.core.files.workspace import key_of

    checksum = key_of(tensors) if rng.random() < 0.8 else rng.choice(("", "0", "\x1b"))
    data = save(tensors, {**metadata, "checksum": checksum})
    return damaged(data, rng) if rng.random() < 0.3 else data


@functools.cache
def _measured() -> Any:
    """A tiny model with the settings and the projections that its Fisher information is measured on."""
    from tiny import tiny_model

    from forget_concept.core.training.fisher import FisherSettings

    model = tiny_model(block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), **_ONE_BLOCK)
    return model, FisherSettings("halves", samples=2, times=4, draws=1), [model.survey.sites[0].key("to_k")]


_ONE_BLOCK = {"up_block_types": ("CrossAttnUpBlock2D",), "layers_per_block": 1}


def fisher_case(rng: random.Random) -> Case:
    """Fisher information as a work folder keeps it."""
    import torch

    model, _, (key,) = _measured()
    shape = list(model.survey.linear(key).weight.shape)
    if rng.random() < 0.3:
        shape[rng.randrange(2)] += rng.choice((-1, 1, 7))
    dtype = rng.choice((torch.float32, torch.float32, torch.float16, torch.int64, torch.float64, torch.bool))
    values = torch.rand(shape) - rng.choice((0.0, 0.0, 0.5, 2.0))
    count = torch.tensor(rng.choice((0, 1, 1, 2, 3, -1, 2**62, 0.5, True)))
    tensors = {key: values.to(dtype), "samples": count if rng.random() < 0.9 else count.expand(3).clone()}
    if rng.random() < 0.1:
        tensors[rng.choice(("x", key + "2"))] = tensors.pop(rng.choice(list(tensors)))
    base = model.model_hash if rng.random() < 0.8 else rng.choice(HOSTILE_TEXTS[3:])
    return Case(_kept(tensors, rng, base_model=base), False, "Fisher information")


def read_fisher(path: Path) -> None:
    import torch

    from forget_concept.core.files.workspace import Workspace
    from forget_concept.core.training import fisher

    model, settings, keys = _measured()
    work = Workspace(path.parent / "work")
    place = work.path("fisher", "x")
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(path.read_bytes())
    total = fisher.FisherSum(model, keys, settings)
    if (found := fisher._load(work, "x", model, total)) is None:
        assert not place.exists()
        return
    total.restore(found)
    assert 0 <= total.count < 2**62 + 1
    values = total.result().values[keys[0]]
    assert values.dtype == torch.float32 and bool(torch.isfinite(values).all()) and float(values.min()) >= 0


class _FewWords:
    """The vocabulary of a discrete attack."""

    words = {3: "star", 7: "tree"}

    def prefixed(self, ids: list[int]) -> list[str]:
        return [" ".join(self.words[index] for index in ids)]


def attack_case(rng: random.Random) -> Case:
    """The words that a discrete attack found, as a work folder keeps them."""
    import torch

    ids = [rng.choice((3, 7, 3, 7, 3, 7, 0, -1, 2**40, 0.5)) for _ in range(rng.randrange(1, 5))]
    tensors = {
        "ids": torch.tensor(ids),
        "losses": torch.rand(rng.randrange(3), dtype=torch.float64),
        "spent": torch.tensor([rng.choice((0, 5, -3, 0.5)), 4]),
    }
    if rng.random() < 0.2:
        name = rng.choice(list(tensors))
        tensors[name] = rng.choice((torch.zeros(2, 2), torch.tensor(True), torch.zeros(0), torch.zeros(2).cfloat()))
    return Case(_kept(tensors, rng), False, "discrete attack")


def read_attack(path: Path) -> None:
    from forget_concept.core.evaluation.attacks import discrete
    from forget_concept.core.files.workspace import Workspace

    work, words = Workspace(path.parent / "work"), _FewWords()
    place = work.path("attack", "x")
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(path.read_bytes())
    found = discrete._found(work, "x", words)  # type: ignore[arg-type]
    assert (found is None) != place.exists()
    if found is not None:
        words.prefixed(found["ids"].tolist())
        assert min(found["spent"].tolist()) >= 0 and all(map(math.isfinite, found["losses"].tolist()))


# -- what pictures, pages and lists say ---------------------------------------------------------------------------


def infotext_case(rng: random.Random) -> Case:
    """The entry of the extension in a picture's generation parameters."""
    weights = ("1", "0.5", "-1", "e", "--", "1e999", "nan", "1" * 5000, ".", "")
    names, digests = ("star", "a, b", "x" * 3000, "\u202e", "é", ""), ("", "0af", "Z")
    entries = [":".join(map(rng.choice, (names, weights, digests))) for _ in range(rng.randrange(6))]
    text = rng.choice((", ", ",", ":", " ")).join(entries)
    if rng.random() < 0.1:
        text = rng.choice((" ", "a", ":", "a:", "1:", ":1", ",", "\n")) * rng.choice((3, 300_000))
    return Case(damaged(text.encode(), rng) if rng.random() < 0.3 else text.encode(), False, "infotext")


def read_an_infotext(path: Path) -> None:
    from forget_concept.sd_webui_ext.infotext import read_infotext, write_infotext

    found = read_infotext(path.read_bytes().decode("utf-8", "replace"))
    assert all(math.isfinite(weight) and name for name, weight, _ in found)
    write_infotext(found)


def form_case(rng: random.Random) -> Case:
    """The last form of a page."""
    return Case(as_text(mutated({"request": REQUEST, "name": "x", "open": True}, rng), rng), False, "form")


def read_form(path: Path) -> None:
    from forget_concept.core.service import page_form

    (path.parent / page_form._LAST).write_bytes(path.read_bytes())
    page_form.recall(path.parent, [])


def prompts_case(rng: random.Random) -> Case:
    """A list of prompts as a table."""
    rows = [["prompt", "sd_seed", "sd_guidance_scale"], ["a star", "3", "7.5"], ["a tree", "", ""]]
    for _ in range(rng.randrange(3)):
        row = rng.choice(rows)
        row[rng.randrange(3)] = rng.choice(
            (*HOSTILE_TEXTS, "nan", "1e400", "-1", "1e30", "0.5", '"', '"a', "a,b", "x\ny", "y" * 140_000)
        )
    data = "\n".join(",".join(row) for row in rows).encode("utf-8", "replace")
    return Case(damaged(data, rng) if rng.random() < 0.3 else data, False, "list of prompts")


def read_prompt_list(path: Path) -> None:
    from forget_concept.core.evaluation.bench.prompt_lists import read_prompts

    for one in read_prompts(path):
        assert one.text.strip() and (one.seed is None or one.seed >= 0)
        assert one.guidance is None or math.isfinite(one.guidance)


def theme_case(rng: random.Random) -> Case:
    """A file of a theme."""
    line = ("# about", "star => circle", "style: wash", "a => b => c", "=>", ": x", "star", "x" * 3000, *HOSTILE_TEXTS)
    data = "\n".join(rng.choice(line) for _ in range(rng.randrange(1, 8))).encode("utf-8", "replace")
    return Case(damaged(data, rng) if rng.random() < 0.3 else data, False, "theme")


def read_theme(path: Path) -> None:
    from forget_concept.core.request.themes import load_theme

    load_theme(path.stem, [path.parent])


KINDS: dict[str, tuple[Callable[[random.Random], Case], Callable[[Path], None], str]] = {
    "patch": (patch_case, read_patch, "x.safetensors"),
    "request": (request_case, read_request, "x.json"),
    "bench": (bench_case, read_bench, "x.json"),
    "picture": (picture_case, read_picture, "x.png"),
    "map": (map_case, read_map, "x.safetensors"),
    "work": (work_case, read_work, "x.safetensors"),
    "results": (results_case, read_results, "x.jsonl"),
    "results table": (results_table_case, read_results_table, "x.csv"),
    "fisher": (fisher_case, read_fisher, "x.safetensors"),
    "attack": (attack_case, read_attack, "x.safetensors"),
    "infotext": (infotext_case, read_an_infotext, "x.txt"),
    "form": (form_case, read_form, "x.json"),
    "prompts": (prompts_case, read_prompt_list, "x.csv"),
    "theme": (theme_case, read_theme, "fuzzed.txt"),
}


def findings(kind: str, count: int, seed: int = 0, folder: Path | None = None) -> Iterator[tuple[int, Case, str]]:
    """Number, case and what went wrong, of ``count`` cases of a kind."""
    make, read, name = KINDS[kind]
    with tempfile.TemporaryDirectory(dir=folder) as made:
        path = Path(made, name)
        for number in range(-1, count):  # the first one imports what the others use
            case = make(random.Random(f"{kind} {seed} {number}"))
            path.write_bytes(case.data)
            os.utime(path, (number + 1, number + 1))
            began, problem = time.process_time(), ""
            try:
                read(path)
                if case.refuse:
                    problem = f"was not refused ({case.about})"
            except ForgetConceptError as error:
                if not str(error).strip() or "Traceback" in str(error):
                    problem = f"has no sentence: {error!r}"
            except Exception:
                problem = traceback.format_exc()
            if (took := time.process_time() - began) > SLOW:
                problem += f" took {took:.1f} s"
            if problem and number >= 0:
                yield number, case, problem


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the cases that are found")
    parser.add_argument("--memory", type=int, default=0, help="bound of the address space's growth, in bytes")
    options = parser.parse_args()
    if options.memory:
        import resource

        for _ in findings(options.kind, 200, -1):
            pass  # what is imported on first use does not count
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + options.memory,) * 2)
    began, found = time.time(), 0
    for number, case, problem in findings(options.kind, options.count, options.seed):
        found += 1
        print(f"{options.kind} {options.seed} {number}: {problem}", flush=True)
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{options.kind}-{options.seed}-{number}").write_bytes(case.data)
    print(
        f"{options.kind}: {options.count:,} cases of seed {options.seed}, {found} findings, {time.time() - began:.0f} s"
    )
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
