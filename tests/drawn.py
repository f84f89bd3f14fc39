"""A stand-in for the embedded model whose pictures encode exactly what prompts name, and a probe that decodes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from forget_concept.core.mini.vocabulary import COLOURS, IDENTITIES, NONE, OBJECTS, STYLES
from forget_concept.core.mini.world import LABELS, Labels
from forget_concept.core.patch.metadata import PatchMetadata
from forget_concept.core.progress import ProgressEvent, report_progress

WORDS = {
    "object": [w.name for w in OBJECTS],
    "style": [w.name for w in STYLES],
    "identity": [w.name for w in IDENTITIES],
    "colour": list(COLOURS),
}
Fault = Callable[[str, int, Labels], Labels]


def labels_named_in(prompt: str) -> Labels:
    """The labels that the words of a prompt name."""
    found = {c: [n for n in names if re.search(rf"\b{n}\b", prompt)] for c, names in WORDS.items()}
    return Labels(**{c: names[0] if names else NONE for c, names in found.items()})


class DrawnPatch:
    """Stands for a patch: while applied, ``fault(prompt, seed, labels)`` returns the labels to show."""

    rank, nbytes = 1, 8

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.metadata: dict[str, str] = {}

    @property
    def about(self) -> PatchMetadata:
        return PatchMetadata.from_strings(self.metadata)

    @about.setter
    def about(self, about: PatchMetadata) -> None:
        self.metadata = about.to_strings()

    def __len__(self) -> int:
        return 1

    def check_fits(self, survey: Any) -> None:
        """Accept any model."""

    @contextmanager
    def applied(self, model: DrawnModel, strength: float = 1.0) -> Any:
        model.faults.append(self.fault)
        try:
            yield
        finally:
            model.faults.remove(self.fault)


class DrawnModel:
    """Shows every prompt correctly, except for the changes of its own ``fault`` and of applied patches."""

    device, dtype, name = torch.device("cpu"), torch.float32, "mini"
    model_hash, guidance = "drawn", 2.5
    text = None  # reserves no words

    def __init__(self, fault: Fault | None = None) -> None:
        self.faults: list[Fault] = [fault] if fault else []
        self.calls: list[tuple[str, int, str]] = []

    @property
    def survey(self) -> DrawnModel:
        return self  # patches are applied to a survey

    def width(self, stream: str) -> None:
        """It reads no text states of any kind."""

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int = 20, negative: str = "", **rest: Any
    ) -> Tensor:
        rows = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            self.calls.append((prompt, seed, negative))
            labels = labels_named_in(prompt)
            for fault in self.faults:
                labels = fault(prompt, seed, labels)
            # a negative prompt removes the concept everywhere
            labels = replace(labels, **{c: NONE for c in WORDS if negative and getattr(labels, c) == negative})
            rows.append([LABELS[c].index(getattr(labels, c)) for c in LABELS])
        for step in range(steps):
            report_progress(rest.get("progress"), ProgressEvent(step + 1, steps))
        return torch.tensor(rows, dtype=torch.float32)

    def decode(self, latents: Tensor, batch: int = 16) -> Tensor:
        images = torch.zeros(len(latents), 3, 16, 16)
        images[:, 0, 0, :4] = latents
        return images / 127.5 - 1


class DrawnProbe:
    """Decodes the labels in the pictures of :class:`DrawnModel`."""

    def eval(self) -> DrawnProbe:
        return self

    def classify(self, images: Tensor) -> list[Labels]:
        rows = ((images[:, 0, 0, :4] + 1) * 127.5).round().int().tolist()
        return [Labels(**{c: LABELS[c][i] for c, i in zip(LABELS, row, strict=True)}) for row in rows]


def forgets(name: str, category: str, damage: Callable[[int], bool] = lambda seed: False) -> DrawnPatch:
    """A patch that removes one concept, and where ``damage(seed)`` is true every style and object."""

    def fault(prompt: str, seed: int, labels: Labels) -> Labels:
        if getattr(labels, category) == name:
            labels = replace(labels, **{category: NONE})
        return replace(labels, object=NONE, style=NONE) if damage(seed) else labels

    return DrawnPatch(fault)
