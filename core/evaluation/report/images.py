"""Inline images of the report, with alternative texts."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from torch import Tensor

from ...models.images import to_pil
from ..attention_pictures import AttentionMap, AttentionPair
from .contents import Pair
from .verdict import fine_percent, percent

__all__ = ["Inline", "inline_map", "inline_pair"]

# images up to EXACT are stored losslessly (PNG), larger ones as a smaller JPEG, to limit the size of the report
EXACT, LARGEST, QUALITY = 256, 512, 90


@dataclass(frozen=True)
class Inline:
    """An image as a data URI, with its size in pixels and its alternative text."""

    uri: str
    width: int
    height: int
    alt: str


def _inline(picture: Tensor, alt: str) -> Inline:
    from PIL.Image import Resampling

    image = to_pil(picture)
    stream = io.BytesIO()
    if max(image.size) <= EXACT:
        kind = "png"
        image.save(stream, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image.thumbnail((LARGEST, LARGEST), Resampling.LANCZOS)
        image.save(stream, "JPEG", quality=QUALITY, subsampling=0)
    data = base64.b64encode(stream.getvalue()).decode()
    return Inline(f"data:image/{kind};base64,{data}", *image.size, alt)


def _where(seed: int | None, model: str, prompt: str) -> str:
    return f"{model}, prompt “{prompt}”" + ("" if seed is None else f", seed {seed}")


def inline_pair(pair: Pair) -> tuple[Inline, Inline]:
    """Inline both images; the alternative text contains the variant, the prompt, the seed and the labels."""

    def one(picture: Tensor, model: str, seen: str | None) -> Inline:
        return _inline(picture, _where(pair.seed, model, pair.prompt) + ("" if seen is None else f": shows {seen}"))

    return one(pair.before, "Unedited model", pair.before_seen), one(pair.after, "With the patch", pair.after_seen)


def _words(found: AttentionMap) -> str:
    """Describe a map: its mean, and its maximum with the position as fractions of width and height."""
    height, width = found.mass.shape
    row, column = divmod(int(found.mass.argmax()), width)
    return (
        f"{fine_percent(found.share)} of the attention on average, at most {fine_percent(float(found.mass.max()))}, "
        f"{percent((column + 0.5) / width)} from the left and {percent((row + 0.5) / height)} from the top"
    )


def inline_map(pair: AttentionPair) -> tuple[Inline, Inline]:
    """Inline both maps over their images."""

    def one(picture: Tensor, found: AttentionMap, model: str) -> Inline:
        where = _where(pair.seed, model, pair.prompt)
        return _inline(picture, f"Attention to “{pair.phrase}”. {where}: {_words(found)}")

    first, second = pair.overlays()
    return one(first, pair.before, "Unedited model"), one(second, pair.after, "With the patch")
