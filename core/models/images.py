"""Images as tensors: loading from files and folders, resizing for a model, conversion to and from uint8 and Pillow."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ModelError, RequestError
from ..files.pictures import check_pixels, decoding
from ..files.reading import size_of_file
from ..progress import Progress, ProgressEvent, report_progress

if TYPE_CHECKING:
    from PIL.Image import Image

    from .latent_diffusion import LatentDiffusion

__all__ = [
    "SUFFIXES",
    "check_images",
    "fit_images",
    "from_bytes",
    "from_pil",
    "load_images",
    "picture_size",
    "to_bytes",
    "to_pil",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MODES = ("L", "LA", "P", "RGB", "RGBA")


def picture_size(model: LatentDiffusion) -> tuple[int, int]:
    """Image size ``(H, W)`` of a model in pixels: 8 times its latents, as in every Stable Diffusion."""
    _, height, width = model.latent_shape
    return 8 * height, 8 * width


def to_bytes(images: Tensor) -> Tensor:
    """Convert images in [-1, 1], of any shape, to uint8 on the CPU."""
    return ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """The inverse of :func:`to_bytes`, up to rounding."""
    return images.float() / 127.5 - 1


def to_pil(picture: Tensor) -> Image:
    """Convert a uint8 image ``(3, H, W)`` to a Pillow image."""
    from PIL import Image

    return Image.fromarray(picture.cpu().movedim(0, -1).contiguous().numpy())


def from_pil(image: Image) -> Tensor:
    """Convert a Pillow image to a uint8 tensor ``(3, H, W)``; the alpha channel is dropped."""
    import numpy

    return torch.from_numpy(numpy.array(image.convert("RGB"))).movedim(-1, 0)


def load_images(
    paths: Iterable[str | os.PathLike[str]], size: tuple[int, int], progress: Progress | None = None
) -> Tensor:
    """Load images from files and folders.

    The EXIF orientation is applied, transparency is composited over white, and images are cropped about the centre to
    the aspect ratio of ``size`` and resized with anti-aliasing.

    Args:
        paths: Image files, and folders of which every image is taken (by its suffix, in order of names, without hidden
            files and sub-folders). A file that is named twice is read once.
        size: ``(H, W)`` in pixels.
        progress: Called with the number of images that are read; may raise :class:`Cancelled`.

    Returns:
        fp32 ``(n, 3, H, W)`` in [-1, 1].

    Raises:
        RequestError: If a file is missing, unreadable, not an image, animated, in a mode other than 8-bit grey, palette
            or RGB, or smaller than half of ``size`` on a side. The message names the file.
        ModelError: If Pillow is not installed.
    """
    files = _files(paths)
    _pillow()
    images = []
    for done, file in enumerate(files):
        report_progress(progress, ProgressEvent(done, len(files), message="reading the pictures"))
        images.append(_loaded(file, size))
    return torch.stack(images)


def check_images(images: Tensor, n_min: int, size: tuple[int, int], name: str = "the concept") -> None:
    """Raise :class:`RequestError` unless ``images`` is ``(n, 3, H, W)`` in [-1, 1] with ``n >= n_min``.

    Args:
        images: The images to check.
        n_min: Smallest number of images.
        size: Required ``(H, W)``.
        name: What the images show, for the message.
    """
    shape = " × ".join(map(str, images.shape)) or "a single number"
    if images.ndim != 4 or images.shape[1] != 3:
        raise RequestError(
            f"The pictures of {name} must be (number, 3, height, width), red, green and blue; these are {shape}."
        )
    if tuple(images.shape[2:]) != tuple(size):
        raise RequestError(
            f"The pictures of {name} must be {_said(size)} for this model, and these are "
            f"{_said((images.shape[2], images.shape[3]))}: resize them first."
        )
    if images.shape[0] < n_min:
        raise RequestError(f"There are too few pictures of {name}: {images.shape[0]}, and at least {n_min} are needed.")
    if not images.dtype.is_floating_point:
        raise RequestError(f"The pictures of {name} must be numbers in [-1, 1], not whole numbers ({images.dtype}).")
    if not torch.isfinite(images).all():
        raise RequestError(f"The pictures of {name} hold values that are not finite numbers.")
    low, high = float(images.min()), float(images.max())
    if low < -1 or high > 1:
        raise RequestError(
            f"The pictures of {name} must have values in [-1, 1], and these go from {low:g} to {high:g}."
        )


def fit_images(images: Tensor, size: tuple[int, int], name: str = "the concept") -> Tensor:
    """Crop and resize images ``(n, 3, H, W)`` in [-1, 1] to ``size`` ``(H, W)``, as :func:`load_images` does.

    Images of that size are returned unchanged. Raises :class:`RequestError` for another shape or dtype, or if they are
    smaller than half of ``size`` on a side.
    """
    shape = " × ".join(map(str, images.shape)) or "a single number"
    if images.ndim != 4 or images.shape[1] != 3 or not images.dtype.is_floating_point:
        raise RequestError(
            f"The pictures of {name} must be (number, 3, height, width), red, green and blue; these are {shape}."
        )
    given = (images.shape[2], images.shape[3])
    if given == tuple(size):
        return images
    if 2 * given[0] < size[0] or 2 * given[1] < size[1]:
        raise RequestError(
            f"The pictures of {name} are too small: {_said(given)}, and this model works with {_said(size)}; at least "
            "half of that is needed on each side."
        )
    scale = min(given[0] / size[0], given[1] / size[1])
    height, width = max(round(scale * size[0]), 1), max(round(scale * size[1]), 1)
    top, left = (given[0] - height) // 2, (given[1] - width) // 2
    cut = images[:, :, top : top + height, left : left + width].float()
    resized = torch.nn.functional.interpolate(cut, size=tuple(size), mode="bicubic", antialias=True)
    return resized.clamp(-1, 1)


def _said(size: tuple[int, int]) -> str:
    # image sizes are written width first
    return f"{size[1]} × {size[0]} pixels"


def _files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    found: dict[Path, Path] = {}
    for given in map(Path, paths):
        try:
            if given.is_dir():
                inside = sorted(
                    path
                    for path in given.iterdir()
                    if not path.name.startswith(".") and path.suffix.lower() in SUFFIXES
                )
                inside = [path for path in inside if path.is_file()]
                if not inside:
                    raise RequestError(f"The folder '{given}' holds no pictures ({', '.join(SUFFIXES)}).")
            else:
                size_of_file(given, RequestError)
                inside = [given]
            for path in inside:
                found.setdefault(path.resolve(), path)
        except OSError as error:
            raise RequestError(f"'{given}' cannot be read: {error.strerror or error}.") from error
    if not found:
        raise RequestError("There are no pictures: name at least one file or folder.")
    return list(found.values())


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ModelError(f"Reading pictures needs Pillow ({error}): pip install pillow.") from error
    return PIL


def _loaded(path: Path, size: tuple[int, int]) -> Tensor:
    pil = _pillow()
    what = f"The file '{path}'"
    with decoding(what), pil.Image.open(path, formats=_FORMATS) as image:
        check_pixels(image, what)
        # MPO is a phone's JPEG with a preview behind the image itself
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise RequestError(f"The file '{path}' is animated: save one of its pictures as a file of its own.")
        if image.mode not in _MODES:
            raise RequestError(
                f"The picture '{path}' has the mode {image.mode}: save it as 8-bit RGB, RGBA, grey or palette."
            )
        picture = _fitted(_flat(pil, pil.ImageOps.exif_transpose(image)), path, size)
    return from_bytes(from_pil(picture))


def _flat(pil: Any, image: Any) -> Any:
    """RGB with transparency composited over white."""
    if image.mode in ("LA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return pil.Image.alpha_composite(pil.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _fitted(image: Any, path: Path, size: tuple[int, int]) -> Any:
    height, width = size
    if 2 * image.height < height or 2 * image.width < width:
        raise RequestError(
            f"The picture '{path}' is too small: {_said((image.height, image.width))}, and this model works with "
            f"{_said(size)}; at least half of that is needed on each side."
        )
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return image.resize((width, height), _pillow().Image.Resampling.LANCZOS, box=box)
