"""Strange files beside a user's own: each is one row with its reason, and nothing else is harmed."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from fuzz import FLAT, SITE, safetensors
from safetensors import SafetensorError
from safetensors.torch import save_file

from forget_concept.core.cli import main
from forget_concept.core.errors import ForgetConceptError, PatchError, RequestError
from forget_concept.core.evaluation.bench.concept_bench import ConceptBench
from forget_concept.core.files.json_text import parse_json
from forget_concept.core.files.safetensors_io import read_metadata, write_safetensors
from forget_concept.core.formats import kohya, load_patch
from forget_concept.core.models.images import load_images
from forget_concept.core.patch.low_rank import LowRank
from forget_concept.core.patch.metadata import PatchMetadata
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.service import html
from forget_concept.core.service.patch_library import PatchLibrary

OFFSETS = '{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,%s]}}'


def own(folder, name="mine"):
    """A sound patch of this package in a folder."""
    made = Patch({f"{SITE}.to_k": LowRank(torch.ones(4, 1), torch.ones(1, 4))}).with_metadata(method="uce")
    kohya.save(made, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def with_metadata(**entries: str) -> bytes:
    """A sound patch whose entries of this project are ``entries``."""
    parts = {f"{FLAT}_to_k.lora_up.weight": [4, 1], f"{FLAT}_to_k.lora_down.weight": [1, 4]}
    header = {"__metadata__": {f"forget_concept.{name}": text for name, text in {"method": "uce", **entries}.items()}}
    for i, (name, shape) in enumerate(parts.items()):
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [16 * i, 16 * i + 16]}
    return safetensors(header, torch.ones(8).numpy().tobytes())


UNREADABLE = {
    "infinite-offset": safetensors((OFFSETS % "1e999").encode(), bytes(4)),
    "digits": safetensors((OFFSETS % ("1" * 5000)).encode(), bytes(4)),
    "negative": safetensors((OFFSETS % "-4").encode(), bytes(4)),
    "nested": safetensors(b'{"__metadata__":' + b"[" * 5000, b""),
    "surrogate": safetensors(b'{"__metadata__":{"forget_concept.method":"\\ud800"}}', b""),
    "not-texts": safetensors(b'{"__metadata__":{"forget_concept.method":{"a":[1]}}}', b""),
    "dimensions": safetensors({"x": {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]}}, bytes(4)),
    "many": safetensors(
        {f"x{i}": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]} for i in range(50_001)}, bytes(4)
    ),
    "list": safetensors(b"[]      ", b""),
    "short": b"abc",
}
STRANGE_ENTRIES = {
    "nested": {"request": "[" * 5000, "settings": "[" * 5000, "history": '{"a":' * 5000},
    "digits": {"seed": "9" * 4000, "settings": '{"rank": ' + "9" * 5000 + "}"},
    "surrogate": {"request": '{"schema": 1, "concepts": [{"name": "\\ud800"}]}', "concepts": '["\\ud800"]'},
    "no-texts": {"parts": '[{"strength": 1, "metadata": {"forget_concept.method": [1]}}, 3]'},
    "infinite": {"parts": '[{"strength": 1e999, "metadata": {}}]', "strength": "1e999"},
    "nan": {"settings": '{"ridge": NaN}', "terms": '{"a": Infinity}'},
}


def test_one_strange_file_is_one_grey_row_and_the_others_can_be_used(tmp_path):
    own(tmp_path)
    for name, data in UNREADABLE.items():
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    for name, entries in STRANGE_ENTRIES.items():
        (tmp_path / f"meta-{name}.safetensors").write_bytes(with_metadata(**entries))
    library = PatchLibrary(lambda: tmp_path)
    entries = library.entries()
    assert {entry.name for entry in entries} == {"mine", *(f"meta-{name}" for name in STRANGE_ENTRIES)}
    reasons = dict(library.unreadable())
    assert set(reasons) == {f"{name}.safetensors" for name in UNREADABLE}
    assert all(why.endswith((".", ")")) and "Error" not in why and str(tmp_path) not in why for why in reasons.values())
    # what hosts do with them: JSON of all, the cards, and one of them inspected and loaded
    json.dumps([entry.as_dict() for entry in entries], allow_nan=False, ensure_ascii=False).encode()
    shown = html.cards(entries, "mine", [], library.unreadable())
    assert shown.count("fc-unreadable") == len(UNREADABLE) and shown.count("<button") == len(entries)
    for entry in entries:
        json.dumps(library.inspect(entry.name), ensure_ascii=False).encode()
        assert len(library.load(entry.name)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_not_unicode_breaks_no_list(tmp_path):
    path = own(tmp_path)
    os.rename(path, os.fsencode(tmp_path) + b"/\xff.safetensors")
    own(tmp_path, "other")
    library = PatchLibrary(lambda: tmp_path)
    assert library.names() == ["other"]
    ((place, why),) = library.unreadable()
    place.encode()
    assert "rename it" in why


@pytest.mark.parametrize("name", UNREADABLE)
def test_each_is_refused_in_words(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(UNREADABLE[name])
    for read in (read_metadata, load_patch):
        with pytest.raises(PatchError, match=r"x\.safetensors"):
            read(path)


@pytest.mark.parametrize("name", STRANGE_ENTRIES)
def test_a_strange_entry_reads_as_missing(name):
    about = PatchMetadata.from_entries(STRANGE_ENTRIES[name])
    assert set(about.malformed) == set(STRANGE_ENTRIES[name])
    with pytest.raises(PatchError, match="metadata of this patch"):
        about.check()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"up": torch.ones(4, 1, dtype=torch.int32)}, "int32"),
        ({"up": torch.ones(4, 1, dtype=torch.bool)}, "bool"),
        ({"up": torch.ones(4, 1, dtype=torch.complex64)}, "complex64"),
        ({"up": torch.full((4, 1), complex("nan"))}, "complex64"),
        ({"up": torch.zeros(4, 1)}, "changes nothing"),
        ({"down": torch.zeros(1, 4)}, "changes nothing"),
        ({"alpha": torch.tensor(0.0)}, "changes nothing"),
        ({"up": torch.ones(4, 0), "down": torch.ones(0, 4)}, "malformed"),
        ({"down": torch.tensor(1.0)}, "malformed"),
        ({"down": torch.ones(4)}, "do not fit"),
        ({"alpha": torch.ones(2)}, "alpha"),
        ({"alpha": torch.tensor(1j)}, "alpha"),
        ({"alpha": torch.tensor(float("nan"))}, "NaN"),
        ({"alpha": torch.tensor(3e38), "up": torch.full((4, 1), 3e38)}, "infinite"),
        ({"format": "context_map_v2"}, "context_map_v2"),
        ({"format": "context_map"}, "context map"),
    ],
)
def test_what_would_do_nothing_or_something_else_is_refused(tmp_path, change, words):
    state = {"up": torch.ones(4, 1), "down": torch.ones(1, 4), "alpha": torch.tensor(1.0)} | change
    metadata = {"forget_concept.format": state.pop("format")} if "format" in state else {}
    names = {"up": "lora_up.weight", "down": "lora_down.weight", "alpha": "alpha"}
    path = tmp_path / "x.safetensors"
    save_file({f"{FLAT}_to_k.{names[part]}": tensor for part, tensor in state.items()}, path, metadata or None)
    with pytest.raises(PatchError, match=words):
        load_patch(path)


def test_dtypes_that_torch_barely_knows_are_read_or_refused(tmp_path):
    written = 0
    floats = [getattr(torch, name) for name in dir(torch) if name.startswith(("float8", "float4"))]
    for dtype in floats:
        raw = torch.full((4, 1), 0x38, dtype=torch.uint8)
        state = {
            f"{FLAT}_to_k.lora_up.weight": raw.view(dtype),
            f"{FLAT}_to_k.lora_down.weight": torch.ones(1, 4),
        }
        path = tmp_path / "x.safetensors"
        try:
            save_file(state, path)
        except (SafetensorError, KeyError):  # this version of safetensors does not write it
            continue
        written += 1
        try:
            assert load_patch(path).max_abs() > 0
        except PatchError as error:
            assert "x.safetensors" in str(error)
    assert written >= 2


# -- files that are none --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    for name in ("a.safetensors", "a.json", "a.png"):
        os.mkfifo(tmp_path / name)
    for read, name in (
        (load_patch, "a.safetensors"),
        (ForgetRequest.from_file, "a.json"),
        (ConceptBench.from_file, "a.json"),
        (lambda path: load_images([path], (8, 8)), "a.png"),
    ):
        with pytest.raises(ForgetConceptError, match="pipe"):
            read(tmp_path / name)
    assert PatchLibrary(lambda: tmp_path).entries() == []


@pytest.mark.parametrize("name", ["a\0b.safetensors", "\ud800.safetensors"])
def test_a_path_that_cannot_be_one_is_refused(name):
    for read in (load_patch, ForgetRequest.from_file, ConceptBench.from_file):
        with pytest.raises(ForgetConceptError):
            read(name)


# -- JSON -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 70 + "]" * 70, "nested too deeply"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested too deeply"),
        ("1" * 5000, "5000 digits"),
        ("1e999", "1e999"),
        ("-1e999", "1e999"),
        ("[NaN]", "NaN"),
        ("Infinity", "Infinity"),
        ('"\\ud800"', "Unicode"),
        ('{"\\udfff": 1}', "Unicode"),
        ("[" + "[]," * 1_000_001 + "[]]", "values"),
        ("{", "Expecting"),
        ("", "Expecting"),
    ],
)
def test_json_is_parsed_within_bounds(text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_and_what_is_json_is_parsed():
    for value in ({"a": [1, 2.5, None, True, "ü", "\U0001f600"]}, [], 10**39, [[[[]]]]):
        assert parse_json(json.dumps(value)) == value
    with pytest.raises(ValueError, match="characters"):
        parse_json(" " * 100, longest=10)


def test_inspecting_shows_no_number_that_is_none(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_metadata(settings='{"ridge": NaN}'))
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert "NaN" in json.dumps(found)
    with pytest.raises(RequestError):
        ForgetRequest.from_json('{"schema": 1, "concepts": [{"name": "\\ud800"}]}')


def test_the_same_tensors_and_metadata_are_the_same_bytes(tmp_path):
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}
    made = []
    for i, order in enumerate((("x", "y", "z"), ("z", "x", "y"), ("y", "z", "x"))):
        write_safetensors(tensors, tmp_path / f"{i}.safetensors", {name: name for name in order})
        made.append((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(set(made)) == 1
