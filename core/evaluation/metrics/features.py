"""Image feature extractors: the embedded model's probe, and Inception."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.error import URLError

import torch
from torch import Tensor

from ...errors import ModelError, RequestError
from ...models.images import from_bytes, to_bytes
from ...progress import Progress, ProgressEvent, report_progress
from .extra import require

if TYPE_CHECKING:
    from ...mini.probe import Probe

__all__ = ["FeatureExtractor", "InceptionFeatures", "ProbeFeatures", "as_images", "features_of"]

INCEPTION_FILE = "inception-2015-12-05.pt"


class FeatureExtractor(Protocol):
    """Extracts image features. Distances are comparable only between features of the same ``name``."""

    name: str

    def features(self, images: Tensor) -> Tensor:
        """Return features ``(n, d)``, fp32 on the CPU, of images ``(n, 3, H, W)`` in [-1, 1]."""
        ...


def as_images(images: Tensor) -> Tensor:
    """Convert images ``(n, 3, H, W)``, uint8 or floating point in [-1, 1], to fp32 in [-1, 1].

    Raises:
        RequestError: If the images have another shape, dtype or range, or there are none.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        shape = " × ".join(map(str, images.shape)) or "a single number"
        raise RequestError(f"The images must be RGB of shape (number, 3, height, width), not {shape}.")
    if not len(images):
        raise RequestError("There are no images to measure: give at least one.")
    if images.dtype == torch.uint8:
        return from_bytes(images)
    if not images.dtype.is_floating_point or not bool(torch.isfinite(images).all()):
        raise RequestError("The images must be 8-bit values, or finite numbers in [-1, 1].")
    if float(images.min()) < -1 or float(images.max()) > 1:
        raise RequestError(
            f"The images' values must be in [-1, 1], but they range from {float(images.min()):g} to "
            f"{float(images.max()):g}."
        )
    return images.float()


def features_of(
    extractor: FeatureExtractor, images: Tensor, batch: int = 32, progress: Progress | None = None
) -> Tensor:
    """Extract features of images in batches.

    Args:
        extractor: The feature extractor.
        images: Images ``(n, 3, H, W)``, uint8 or in [-1, 1].
        batch: Images per batch.
        progress: Receives the number of processed images.

    Returns:
        Features ``(n, d)``, fp32.

    Raises:
        RequestError: If the images have the wrong shape, dtype or range, or ``batch`` is below 1.
    """
    if batch < 1:
        raise RequestError(f"The batch must be at least 1, not {batch}.")
    if images.ndim != 4 or not len(images):
        as_images(images)  # raises
    found = []
    for start in range(0, len(images), batch):
        found.append(extractor.features(as_images(images[start : start + batch])).float().cpu())
        done = min(start + batch, len(images))
        report_progress(
            progress, ProgressEvent(done, len(images), message=f"extracting features of {len(images)} images")
        )
    return torch.cat(found)


class ProbeFeatures:
    """The last hidden layer of the embedded model's probe, of width 128."""

    name = "probe"

    def __init__(self, probe: Probe) -> None:
        self.probe = probe.eval()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self.probe.features(images.to(next(self.probe.parameters()).device)).cpu()


class InceptionFeatures:
    """The 2,048 Inception features of the published FID and KID, with clean-fid's preprocessing.

    Images are converted to 8 bits and resized with anti-aliasing.

    Args:
        device: Device of the network.
        folder: Folder of the network's file (91 MB), which clean-fid downloads if it is missing. Default: torch's
            checkpoint folder.

    Raises:
        ModelError: If clean-fid is not installed, or the network can be neither loaded nor downloaded.

    Reference: Parmar et al., arXiv 2104.11222.
    """

    name = "inception"

    def __init__(self, device: torch.device | str = "cpu", folder: str | os.PathLike[str] | None = None) -> None:
        what = "The Inception network of FID and KID"
        network = require("cleanfid.inception_torchscript", what)
        self._resize: Any = require("cleanfid.resize", what).build_resizer("clean")
        place = Path(folder) if folder is not None else Path(torch.hub.get_dir()) / "checkpoints"
        try:
            place.mkdir(parents=True, exist_ok=True)
            self._network = network.InceptionV3W(str(place), download=True, resize_inside=False).to(device).eval()
        except (OSError, URLError, RuntimeError) as error:
            raise ModelError(
                f"The Inception network '{place / INCEPTION_FILE}' can neither be read nor downloaded ({error}): put "
                "the file there, or delete it where it is damaged and connect to the network."
            ) from error
        self.device = torch.device(device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        pixels = to_bytes(images).permute(0, 2, 3, 1).numpy()
        resized = torch.stack([torch.from_numpy(self._resize(picture)) for picture in pixels]).permute(0, 3, 1, 2)
        found: Tensor = self._network(resized.to(self.device).float()).float().cpu()
        return found
