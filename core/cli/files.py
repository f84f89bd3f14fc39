"""File output of the command line: the package's own writers, and PNG pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..files.writing import check_distinct, check_folder, check_writable, make_folder, write_bytes, write_json

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "check_distinct",
    "check_folder",
    "check_patch_file",
    "check_writable",
    "make_folder",
    "write_bytes",
    "write_json",
    "write_picture",
]


def check_patch_file(path: Path) -> Path:
    """:func:`check_writable` for a file of tensors, whose name has to end in ``.safetensors``."""
    from ..files.safetensors_io import check_ending

    return check_ending(check_writable(path))


def write_picture(path: Path, image: Image, notes: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically, with ``notes`` as its text chunks."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in (notes or {}).items():
        info.add_itxt(name, text)
    stream = io.BytesIO()
    image.save(stream, "PNG", pnginfo=info)
    write_bytes(path, stream.getvalue())
