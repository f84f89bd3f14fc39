"""The models that evaluate images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..mini.probe import Probe
from ..mini.second_probe import load_second_probe
from .drawing import ImageClassifier
from .judges import Judge, WorldJudge
from .metrics import FeatureExtractor, ImageText, PairDistance, ProbeDistance, ProbeFeatures, ProbeImageText

__all__ = ["Evaluators"]


@dataclass(frozen=True)
class Evaluators:
    """The models that evaluate images.

    Attributes:
        judge: Classifies the images.
        features: Feature extractor for FID and KID; ``None`` omits them.
        distance: Perceptual distance of image pairs; ``None`` omits it.
        image_text: CLIP or a substitute for the CLIP score; ``None`` omits it.
        second: A second classifier, of another architecture, whose labels are compared with the judge's.
        missing: Why a part of the report is omitted, by the name of the part.
    """

    judge: Judge
    features: FeatureExtractor | None = None
    distance: PairDistance | None = None
    image_text: ImageText | None = None
    second: ImageClassifier | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def embedded(cls, probe: Probe) -> Evaluators:
        """Return the evaluators of the embedded model: its probe and the second one."""
        # a stand-in for the probe judges pictures that the second one cannot read
        second = load_second_probe().to(next(probe.parameters()).device) if isinstance(probe, Probe) else None
        return cls(WorldJudge(probe), ProbeFeatures(probe), ProbeDistance(probe), ProbeImageText(probe), second=second)
