"""A second classifier of the embedded world, of another architecture, seed and training, to check the first one with.

The probe sees an image through strided convolutions and a flattened map; this one has depthwise convolutions in
residual blocks and averages over the image (after ConvNeXt, Liu et al. 2022, arXiv 2201.03545). It is also trained on
half subjects, blobs and broken silhouettes whose subject is *none*: what is left of a concept is not the concept.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .probe import Classifier
from .world import LABELS

__all__ = ["SecondProbe", "load_second_probe"]


class _Block(nn.Module):
    """A residual block: depthwise convolution over 7 × 7, then two layers at every place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 7, 1, 3, groups=width),
            nn.GroupNorm(1, width),
            nn.Conv2d(width, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, width, 1),
        )
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.scale * self.layers(x)
        return out


class SecondProbe(Classifier):
    """Maps images `(n, 3, 128, 128)` in [-1, 1] to logits per category, `{category: (n, classes)}`."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), blocks: tuple[int, ...] = (2, 2, 2)) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        inside, patch = 3, 4
        for width, count in zip(widths, blocks, strict=True):
            parts += [nn.Conv2d(inside, width, patch, patch), nn.GroupNorm(1, width)]
            parts += [_Block(width) for _ in range(count)]
            inside, patch = width, 2
        self.trunk = nn.Sequential(*parts)
        self.norm = nn.LayerNorm(inside)
        self.heads = nn.ModuleDict({name: nn.Linear(inside, len(classes)) for name, classes in LABELS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.trunk(images).mean((2, 3)))
        return {name: head(hidden) for name, head in self.heads.items()}


def load_second_probe(folder: Path | None = None) -> SecondProbe:
    """Load the trained classifier in fp32, in evaluation mode."""
    from safetensors.torch import load_file

    from . import weights_folder

    probe = SecondProbe()
    state = load_file((folder or weights_folder()) / "second_probe.safetensors")
    probe.load_state_dict({key: value.float() for key, value in state.items()})
    return probe.eval()
