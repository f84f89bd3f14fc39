"""Reading and writing safetensors files; nothing is unpickled, and writing is atomic."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import PatchError, listed
from .json_text import LONGEST, parse_json
from .reading import size_of_file
from .writing import write_bytes

__all__ = [
    "MODEL_SUFFIXES",
    "SUFFIX",
    "check_ending",
    "check_finite",
    "read_metadata",
    "read_names",
    "read_safetensors",
    "widened",
    "write_safetensors",
]

SUFFIX = ".safetensors"
MODEL_SUFFIXES = (SUFFIX, ".sft", ".ckpt", ".pt", ".pth", ".bin", ".pkl")

# ten times those of the largest models; a hundred thousand kept a program busy for 12 seconds
_MOST_TENSORS = 50_000
_MOST_DIMENSIONS = 64  # torch's own bound
_PICKLES = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))


def _header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON header of a safetensors file, checked; the errors name what is wrong with another file."""
    size = size_of_file(path, PatchError)
    try:
        with Path(path).open("rb") as stream:
            start = stream.read(8)
            opening = stream.read(1)
            length = int.from_bytes(start, "little")
            # the two bytes that open a pickle are also those of some headers' length: the brace tells them apart
            sound = len(start) == 8 and 2 <= length <= LONGEST and opening == b"{"
            if not sound and start.startswith(_PICKLES):
                raise PatchError(
                    f"'{path}' is a pickle (.pt, .ckpt, .bin), not a safetensors file: pickles can run code and are "
                    "never loaded. Convert it to safetensors first."
                )
            if len(start) < 8:
                raise PatchError(f"'{path}' is not a safetensors file: it has only {size} bytes.")
            if not sound:
                raise PatchError(f"'{path}' is not a safetensors file: its header is invalid.")
            if length + 8 > size:
                raise PatchError(
                    f"'{path}' is cut off: it has {size} bytes, and the header alone needs {length + 8}. Download or "
                    "copy it again."
                )
            stream.seek(8)
            raw = stream.read(length)
    except OSError as error:
        raise PatchError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    try:
        header = parse_json(raw.decode("utf-8"))
        needed = 8 + length + _end(header)
    except ValueError as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise PatchError(f"'{path}' is not a safetensors file: its header is invalid ({why}).") from None
    if needed > size:
        raise PatchError(
            f"'{path}' is cut off: it should have {needed} bytes and has {size}. Download or copy it again."
        )
    return dict(header)


def _end(header: Any) -> int:
    """Where the last tensor ends, in bytes behind the header; raises :class:`ValueError` for a malformed header."""
    if not isinstance(header, dict):
        raise ValueError("it is not a JSON object")
    if len(header) > _MOST_TENSORS:
        raise ValueError(f"it has {len(header):,} tensors, and at most {_MOST_TENSORS:,} are read")
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(text, str) for text in entry.values()):
                raise ValueError("its metadata are not texts by name")
            continue
        shown = name[:80]
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            raise ValueError(f"the tensor {shown} has no dtype")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not _is_counts(shape) or len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"the tensor {shown} has no valid shape")
        if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise ValueError(f"the tensor {shown} has no valid place in the file")
        end = max(end, offsets[1])
    return end


def _is_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a file, without its tensors. Raises as :func:`read_safetensors`."""
    return dict(_header(path).get("__metadata__", {}))


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of a file's tensors. Raises as :func:`read_safetensors`."""
    return [name for name in _header(path) if name != "__metadata__"]


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata of a file.

    Raises:
        PatchError: The file is missing, a pickle, cut off, not a safetensors file, or contains values that are not
            finite.
    """
    from safetensors.torch import load_file

    metadata = read_metadata(path)
    try:
        tensors = load_file(str(path))
    except Exception as error:  # of a dtype that this version of torch or safetensors does not know, any
        raise PatchError(f"'{path}' is damaged, or of a newer kind: {str(error).rstrip('.')}.") from error
    check_finite(tensors, path)
    return tensors, metadata


def check_finite(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Check that all values are finite.

    Raises:
        PatchError: A tensor contains NaN or infinity; the message names the tensors and ``path``.
    """
    bad = [name for name, t in tensors.items() if _is_float(t) and not torch.isfinite(t.float()).all()]
    if bad:
        raise PatchError(f"'{path}' holds NaN or infinite values ({listed(bad, 2)}): it is damaged, create it again.")


def _is_float(tensor: Tensor) -> bool:
    # the name of a dtype that packs two values into one element, which cannot be converted, ends in "x2"
    return tensor.is_floating_point() and not str(tensor.dtype).endswith("x2")


def widened(name: str, tensor: Tensor, source: str) -> Tensor:
    """A factor in fp32, or in fp64 if it is; narrower floats of every kind are exact in fp32.

    Args:
        name: The tensor's name, for error messages.
        tensor: The tensor.
        source: What error messages call its file.

    Raises:
        PatchError: Its dtype holds no floats, or packs two into one element.
    """
    if _is_float(tensor):
        return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    dtype = str(tensor.dtype).removeprefix("torch.")
    raise PatchError(
        f"The tensor {name} in '{source}' holds {dtype} values, not floating-point numbers: it may be quantized. "
        "Convert the file to float32 or float16 first."
    )


def check_ending(path: Path) -> Path:
    """``path`` itself, if it ends in ``.safetensors``: loaders choose how to read a file by its ending.

    Raises:
        PatchError: It has another ending, or none.
    """
    if path.suffix.lower() != SUFFIX:
        name = path.stem if path.suffix.lower() in MODEL_SUFFIXES else path.name
        raise PatchError(
            f"'{path}' cannot be written: it would be a safetensors file, and programs read a file by its ending; call "
            f"it '{name}{SUFFIX}'."
        )
    return path


def write_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file atomically (:func:`write_bytes`).

    Raises:
        PatchError: The file cannot be written, its name does not end in ``.safetensors``, or a value is not finite;
            nothing is left behind.
    """
    from safetensors.torch import save

    file = Path(path)
    if not file.is_dir():  # which the writer says in words of its own
        check_ending(file)
    check_finite(tensors, path)
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_bytes(file, _in_order(save(plain, metadata=dict(metadata) if metadata else None)), PatchError)


def _in_order(data: bytes) -> bytes:
    """The bytes of a file with its metadata in alphabetical order: safetensors writes them in a random one."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[start:]))
