"""A folder for what takes long to make: Fisher information, inversions, self-made pictures, trainings cut short.

Nothing in it is needed: what is missing is made anew. A file is found by its kind and a key, the hash of everything it
depends on, so that a file of another model or request is never taken for this one's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import RequestError
from .arrays import tensor_bytes
from .safetensors_io import read_metadata, read_safetensors, write_safetensors

__all__ = ["Workspace", "key_of"]


def key_of(*parts: Any) -> str:
    """A hash of plain values and tensors, as a key: equal exactly for equal parts (dtype and shape included)."""
    digest = hashlib.sha256()
    for part in parts:
        _add(digest, part)
    return digest.hexdigest()[:32]


def _add(digest: Any, part: Any) -> None:
    if isinstance(part, Tensor):
        digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
        digest.update(tensor_bytes(part))
    elif isinstance(part, Mapping):
        digest.update(b"{")
        for name in sorted(part):
            _add(digest, str(name))
            _add(digest, part[name])
        digest.update(b"}")
    elif isinstance(part, (list, tuple)):
        digest.update(b"[")
        for item in part:
            _add(digest, item)
        digest.update(b"]")
    else:
        digest.update(json.dumps(part, ensure_ascii=False).encode() + b";")


class Workspace:
    """Tensors by kind and key, as safetensors files ``<folder>/<kind>/<key>.safetensors``, each whole or not there."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises :class:`RequestError` where the folder cannot be made."""
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"The work folder '{folder}' cannot be made: {error.strerror or error}.") from error

    def path(self, kind: str, key: str) -> Path:
        """Where it is, or would be."""
        if not re.fullmatch(r"[\w.-]+", kind) or not re.fullmatch(r"[\w.-]+", key):
            raise RequestError(f"'{kind}/{key}' cannot be the name of a file in a work folder.")
        return self.folder / kind / f"{key}.safetensors"

    def load(self, kind: str, key: str) -> dict[str, Tensor] | None:
        """The tensors, on the CPU, or ``None`` where there are none.

        Raises :class:`PatchError`, naming the file, where it is damaged.
        """
        path = self.path(kind, key)
        return read_safetensors(path)[0] if path.exists() else None

    def metadata(self, kind: str, key: str) -> dict[str, str]:
        """What was said of them when they were saved; empty where there are none."""
        path = self.path(kind, key)
        return read_metadata(path) if path.exists() else {}

    def save(self, kind: str, key: str, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
        """Write them, in place of earlier ones. Raises :class:`PatchError` where that cannot be done."""
        path = self.path(kind, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"The work folder '{path.parent}' cannot be made: {error.strerror or error}.") from error
        plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        write_safetensors(plain, path, metadata)
        return path

    def remove(self, kind: str, key: str) -> None:
        """Drop them; where there are none, nothing happens."""
        self.path(kind, key).unlink(missing_ok=True)
