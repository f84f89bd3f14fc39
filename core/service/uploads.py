"""Pictures that are uploaded as base64: validated, and written to files for as long as a job needs them."""

from __future__ import annotations

import base64
import binascii
import io
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import RequestError
from ..files.pictures import check_pixels, decoding

__all__ = ["MAX_BYTES", "MAX_IMAGES", "Uploads"]

MAX_IMAGES = 100
MAX_BYTES = 8 * 2**20
_FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")


class Uploads:
    """Temporary files of a request's pictures; :meth:`remove` deletes them.

    ``places`` lists the files by the index of their concept.
    """

    def __init__(self, given: Mapping[int, Sequence[str]]) -> None:
        """Write the pictures ``given`` by concept.

        Raises:
            RequestError: Naming the picture that is not a PNG, JPEG or WebP, or is too large.
        """
        count = sum(len(texts) for texts in given.values())
        if count > MAX_IMAGES:
            raise RequestError(f"There are {count} pictures, and at most {MAX_IMAGES} are taken.")
        self._folder = tempfile.TemporaryDirectory(prefix="forget-concept-") if count else None
        self.places: dict[int, list[str]] = {}
        try:
            for number, texts in given.items():
                for i, text in enumerate(texts):
                    data, end = _picture(text, f"Picture {i + 1} of concept {number + 1}")
                    assert self._folder is not None
                    file = Path(self._folder.name, f"{number}-{i}{end}")
                    file.write_bytes(data)
                    self.places.setdefault(number, []).append(str(file))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Delete the files; calling it again does nothing."""
        if self._folder is not None:
            self._folder.cleanup()


def _picture(text: str, name: str) -> tuple[bytes, str]:
    from PIL import Image

    plain = _DATA_URL.sub("", text, count=1) if text.startswith("data:") else text
    if len(plain) > MAX_BYTES * 4 // 3 + 4:
        raise RequestError(f"{name} is too large: at most {MAX_BYTES // 2**20} MB each are taken.")
    try:
        data = base64.b64decode(plain, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name} is not base64: {error}.") from error
    with decoding(name), Image.open(io.BytesIO(data), formats=tuple(_FORMATS)) as image:
        check_pixels(image, name)
        image.load()
        return data, _FORMATS[image.format or "PNG"]
