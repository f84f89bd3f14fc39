"""A cache of results that take long to compute: Fisher information, inversions, generated images, checkpoints.

Everything in it can be deleted and is then computed again. A file is identified by its kind and a key, the hash of
everything that it depends on, so that a file of another model or request is never used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import PatchError, RequestError
from .arrays import tensor_bytes
from .safetensors_io import read_metadata, read_safetensors, write_safetensors

__all__ = ["Workspace", "key_of"]


def key_of(*parts: Any) -> str:
    """Hash plain values and tensors into a key; dtypes and shapes count."""
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


_CHECKSUM = "checksum"
log = logging.getLogger(__name__)


def _fits(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int | None]]) -> bool:
    return tensors.keys() == shapes.keys() and all(
        tensors[name].ndim == len(shape)
        and all(wanted in (None, side) for side, wanted in zip(tensors[name].shape, shape, strict=True))
        for name, shape in shapes.items()
    )


class Workspace:
    """Tensors by kind and key, in safetensors files ``<folder>/<kind>/<key>.safetensors`` that are written atomically.

    Args:
        folder: The folder, which is created.

    Raises:
        RequestError: The folder cannot be created.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"The work folder '{folder}' cannot be created: {error.strerror or error}.") from error

    def path(self, kind: str, key: str) -> Path:
        """The path of a file, whether or not it exists.

        Raises:
            RequestError: ``kind`` or ``key`` is not a file name.
        """
        if not re.fullmatch(r"[\w.-]+", kind) or not re.fullmatch(r"[\w.-]+", key):
            raise RequestError(f"'{kind}/{key}' cannot be the name of a file in a work folder.")
        return self.folder / kind / f"{key}.safetensors"

    def load(
        self, kind: str, key: str, shapes: Mapping[str, Sequence[int | None]] | None = None
    ) -> dict[str, Tensor] | None:
        """The tensors of a file, on the CPU; ``None``: there is none that can be used, so its contents are made anew.

        A file that was changed since it was written, or does not have what it should, is deleted, with a warning.

        Args:
            kind: Kind of the file.
            key: Its key.
            shapes: The names of its tensors and their shapes; ``None`` in a shape: any number. Default: not checked.
        """
        path = self.path(kind, key)
        if not path.exists():
            return None
        try:
            tensors, metadata = read_safetensors(path)
        except PatchError as error:
            self.discard(kind, key, str(error))
            return None
        if metadata.get(_CHECKSUM) != key_of(tensors):
            self.discard(kind, key, "its contents were changed")
            return None
        if shapes is not None and not _fits(tensors, shapes):
            self.discard(kind, key, "it has other contents than it should")
            return None
        return tensors

    def discard(self, kind: str, key: str, why: str) -> None:
        """Delete a file whose contents cannot be used, and log that they are made anew."""
        path = self.path(kind, key)
        log.warning("'%s' in the work folder cannot be used (%s): it is made anew.", path.name, why.rstrip("."))
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise RequestError(
                f"'{path}' is damaged and cannot be deleted ({error.strerror or error}): delete it, or choose another "
                "work folder."
            ) from error

    def metadata(self, kind: str, key: str) -> dict[str, str]:
        """The metadata of a file; empty if there is no such file, or none that can be read."""
        try:
            found = read_metadata(self.path(kind, key))
        except PatchError:
            return {}
        return {name: text for name, text in found.items() if name != _CHECKSUM}

    def save(self, kind: str, key: str, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
        """Write a file and return its path; an existing one is replaced.

        Raises:
            RequestError: The folder cannot be created.
            PatchError: The file cannot be written, or a value is not finite.
        """
        path = self.path(kind, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(
                f"The work folder '{path.parent}' cannot be created: {error.strerror or error}."
            ) from error
        plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        write_safetensors(plain, path, {**metadata, _CHECKSUM: key_of(plain)})
        return path

    def remove(self, kind: str, key: str) -> None:
        """Delete a file, if it exists."""
        self.path(kind, key).unlink(missing_ok=True)
