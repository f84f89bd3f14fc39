"""The probe: a small classifier of object, style, identity and colour, each with the class *none*.

It is trained on rendered images, on blurred, noised and shifted images with the same labels, and on destroyed images
(scrambled, blotched, without a subject) whose subject is *none*. A forgotten concept often leaves a shape without
meaning, which must not be classified as the nearest concept.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .world import LABELS, Labels


class Classifier(nn.Module):
    """A network of logits per category that labels images."""

    @torch.no_grad()
    def classify(self, images: Tensor, batch: int = 64) -> list[Labels]:
        """Return the most likely class of each category for each image."""
        self.eval()
        device = next(self.parameters()).device
        found: list[Labels] = []
        for part in images.split(batch):
            winners = {k: logits.argmax(1).tolist() for k, logits in self(part.float().to(device)).items()}
            found += [Labels(**{k: LABELS[k][winners[k][row]] for k in LABELS}) for row in range(len(part))]
        return found


class Probe(Classifier):
    """Maps images `(n, 3, 128, 128)` in [-1, 1] to logits per category, `{category: (n, classes)}`."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()

        def block(inside: int, outside: int, kernel: int = 3) -> list[nn.Module]:
            return [nn.Conv2d(inside, outside, kernel, 2, kernel // 2), nn.GroupNorm(4, outside), nn.SiLU()]

        self.trunk = nn.Sequential(
            *block(3, width, 5),
            *block(width, 2 * width),
            *block(2 * width, 3 * width),
            *block(3 * width, 4 * width),
            nn.Conv2d(4 * width, 4 * width, 3, 1, 1),
            nn.GroupNorm(4, 4 * width),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(16 * 4 * width, 128),
            nn.SiLU(),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(classes)) for name, classes in LABELS.items()})

    def features(self, images: Tensor) -> Tensor:
        """Return the last hidden layer, `(n, 128)`."""
        hidden: Tensor = self.trunk(images)
        return hidden

    def layers(self, images: Tensor) -> list[Tensor]:
        """Return the five activations after the convolutions, each `(n, channels, h, w)`, from fine to coarse."""
        found = []
        for part in self.trunk:
            if isinstance(part, nn.AvgPool2d):
                break
            images = part(images)
            if isinstance(part, nn.SiLU):
                found.append(images)
        return found

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.features(images)
        return {name: head(hidden) for name, head in self.heads.items()}


def load_probe(folder: Path | None = None) -> Probe:
    """Load the trained probe in fp32, in evaluation mode."""
    from safetensors.torch import load_file

    from . import weights_folder

    probe = Probe()
    state = load_file((folder or weights_folder()) / "probe.safetensors")
    probe.load_state_dict({key: value.float() for key, value in state.items()})
    return probe.eval()
