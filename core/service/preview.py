"""A patch's preview picture, as hosts show one beside a LoRA: pictures side by side, or the patch itself as bars."""

from __future__ import annotations

import io
from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.images import to_pil
from ..patch.patch import Patch

__all__ = ["bars", "png", "row"]

_SIDE = 512


def row(images: Tensor) -> Tensor:
    """Up to four pictures side by side, ``(h, w, 3)`` in [0, 1]."""
    few = images[:4, ..., :3].detach().float().cpu()
    height, width = few.shape[1:3]
    scale = min(1.0, _SIDE / height)
    if scale < 1:
        size = (round(height * scale), max(round(width * scale), 1))
        few = torch.nn.functional.interpolate(few.movedim(-1, 1), size=size, mode="bicubic", antialias=True)
        few = few.movedim(1, -1)
    return torch.cat(list(few.clamp(0, 1)), 1)


_COLOURS = {"to_q": (0.42, 0.62, 0.94), "to_k": (0.95, 0.71, 0.32), "to_v": (0.45, 0.82, 0.58)}
_OTHER = (0.72, 0.55, 0.88)


def bars(patch: Patch) -> Tensor:
    """How far each weight is moved, first layer to the left, ``(h, w, 3)`` in [0, 1]; a colour a projection."""
    keys = list(patch.factors)
    sizes = [float(patch.factors[key].delta().norm()) for key in keys]
    height, top = 256, max(max(sizes), 1e-12)
    step = max(_SIDE // len(keys), 1)
    picture = torch.full((height, step * len(keys) + 16, 3), 0.11)
    for i, (key, size) in enumerate(zip(keys, sizes, strict=True)):
        tall = max(round(size / top * (height - 16)), 1)
        colour = torch.tensor(_COLOURS.get(key.rpartition(".")[2], _OTHER))
        picture[height - 8 - tall : height - 8, 8 + i * step : 8 + (i + 1) * step - (step > 2)] = colour
    return picture


def png(picture: Tensor, texts: Mapping[str, str] | None = None) -> bytes:
    """A picture ``(h, w, 3)`` in [0, 1] as PNG, with ``texts`` as its text entries."""
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    for name, text in (texts or {}).items():
        about.add_text(name, text)
    stream = io.BytesIO()
    to_pil((picture.movedim(-1, 0) * 255).round().to(torch.uint8)).save(stream, "PNG", pnginfo=about)
    return stream.getvalue()
