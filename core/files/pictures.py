"""Decoding of untrusted pictures within bounds; every error of the decoder becomes one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ForgetConceptError, RequestError

__all__ = ["MAX_PIXELS", "check_pixels", "decoding"]

MAX_PIXELS = 40_000_000


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Turn everything that Pillow raises into one sentence.

    A decoder raises whatever a crafted file makes it raise: beside its own errors those of zlib, struct and arithmetic.

    Args:
        what: The picture, to begin the sentence with.

    Raises:
        RequestError: It cannot be decoded.
    """
    try:
        yield
    except ForgetConceptError:
        raise
    except Exception as error:
        # its own words about a file of another kind are no more than the file's path
        unknown = type(error).__name__ == "UnidentifiedImageError"
        words = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        why = "it is of another kind, or damaged" if unknown else words
        raise RequestError(f"{what} cannot be read as a picture: {why.rstrip('.')[:200]}.") from error


def check_pixels(image: Any, what: str) -> None:
    """Check an opened picture before its pixels are decoded.

    Args:
        image: The picture, as ``PIL.Image.open`` returns it.
        what: As in :func:`decoding`.

    Raises:
        RequestError: It has more than :data:`MAX_PIXELS` pixels.
    """
    if image.width * image.height > MAX_PIXELS:
        raise RequestError(
            f"{what} has {image.width} × {image.height} pixels, and at most {MAX_PIXELS:,} in all are read: make it "
            "smaller."
        )
