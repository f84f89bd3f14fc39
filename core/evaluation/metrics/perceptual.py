"""Perceptual distance of image pairs: LPIPS by torchmetrics, or the same formula on the embedded model's probe.

The activations of both images are normalized over the channels; their squared differences are weighted by channel,
averaged over space and summed over layers.

Reference: Zhang et al., arXiv 1801.03924, equation 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.error import URLError

import torch
from torch import Tensor

from ...errors import ModelError, RequestError
from ...progress import Progress, ProgressEvent, report_progress
from .extra import require
from .features import as_images
from .mean import Mean

if TYPE_CHECKING:
    from ...mini.probe import Probe

__all__ = ["LPIPS", "PairDistance", "ProbeDistance", "layer_distance", "perceptual_distance"]


class PairDistance(Protocol):
    """Computes distances of image pairs."""

    name: str

    def distances(self, first: Tensor, second: Tensor) -> Tensor:
        """Return distances ``(n,)``, fp32 on the CPU, of paired images, each ``(n, 3, H, W)`` in [-1, 1]."""
        ...


class LPIPS:
    """LPIPS by torchmetrics. torchvision downloads missing ImageNet weights.

    Args:
        network: ``"alex"``, ``"vgg"`` or ``"squeeze"``.
        device: Device of the network.

    Raises:
        ModelError: If torchmetrics or torchvision is not installed, or the weights can be neither loaded nor
            downloaded.
        RequestError: If the network is unknown.
    """

    def __init__(self, network: Literal["alex", "vgg", "squeeze"] = "alex", device: torch.device | str = "cpu") -> None:
        require("torchvision", "LPIPS")
        metric = require("torchmetrics.image.lpip", "LPIPS").LearnedPerceptualImagePatchSimilarity
        if network not in ("alex", "vgg", "squeeze"):
            raise RequestError(f"LPIPS has no network '{network}': choose alex, vgg or squeeze.")
        try:
            self._metric: Any = metric(net_type=network, reduction="none").to(device)
        except (OSError, URLError, RuntimeError) as error:
            raise ModelError(
                f"The weights of LPIPS' network '{network}' can neither be read nor downloaded ({error}): connect to "
                f"the network once, or put torchvision's file into {torch.hub.get_dir()}/checkpoints."
            ) from error
        self.device = torch.device(device)
        self.name = f"lpips {network}"

    @torch.no_grad()
    def distances(self, first: Tensor, second: Tensor) -> Tensor:
        self._metric.reset()
        self._metric.update(first.to(self.device), second.to(self.device))
        distances: Tensor = self._metric.compute().flatten().float().cpu()
        return distances


class ProbeDistance:
    """The LPIPS formula on the layers of the embedded model's probe, with equal channel weights."""

    name = "probe"

    def __init__(self, probe: Probe) -> None:
        self.probe = probe.eval()

    @torch.no_grad()
    def distances(self, first: Tensor, second: Tensor) -> Tensor:
        device = next(self.probe.parameters()).device
        layers = (self.probe.layers(images.to(device)) for images in (first, second))
        return layer_distance(*layers).float().cpu()


def layer_distance(
    first: Sequence[Tensor], second: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> Tensor:
    """Return ``Σ_l mean_hw Σ_c w_lc (ŷ¹ - ŷ²)²``, ``(n,)``, where ``ŷ`` is normalized over the channels.

    Args:
        first: Activations ``(n, c, h, w)`` per layer.
        second: Activations of the paired images.
        weights: Channel weights ``(c,)`` per layer. Default: 1.

    Reference: Zhang et al., arXiv 1801.03924, equation 1.
    """
    total = torch.zeros(len(first[0]), device=first[0].device, dtype=first[0].dtype)
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        difference = (_directions(one) - _directions(other)).square()
        if weights is not None:
            difference = difference * weights[number].to(difference).view(1, -1, 1, 1)
        total = total + difference.sum(1).mean((1, 2))
    return total


def _directions(activations: Tensor) -> Tensor:
    return activations / (activations.square().sum(1, keepdim=True) + 1e-8).sqrt()


def perceptual_distance(
    metric: PairDistance, first: Tensor, second: Tensor, batch: int = 32, progress: Progress | None = None
) -> Mean:
    """Return the mean distance of image pairs.

    Args:
        metric: The distance.
        first: Images ``(n, 3, H, W)``, uint8 or in [-1, 1].
        second: The paired images.
        batch: Pairs per batch.
        progress: Receives the number of processed pairs.

    Raises:
        RequestError: If the shapes differ, the tensors are not images, or ``batch`` is below 1.
    """
    if first.shape != second.shape:
        raise RequestError(
            "Images are compared pair by pair, so both tensors must have one shape, not "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
    if batch < 1:
        raise RequestError(f"The batch must be at least 1, not {batch}.")
    if first.ndim != 4 or not len(first):
        as_images(first)  # raises
    found = []
    for start in range(0, len(first), batch):
        part = slice(start, start + batch)
        found.append(metric.distances(as_images(first[part]), as_images(second[part])))
        done = min(start + batch, len(first))
        report_progress(progress, ProgressEvent(done, len(first), message=f"comparing {len(first)} image pairs"))
    return Mean.of(torch.cat(found))
