"""Image metrics: FID, KID, CLIP score and accuracy, and LPIPS, each independent of its feature extractor.

Checkpoints use transformers' CLIP and, with the extra ``forget-concept[evaluation]``, clean-fid's Inception,
open_clip's CLIP and torchmetrics' LPIPS. The embedded model uses its probe, so that nothing is downloaded.
"""

from __future__ import annotations

from .clip import clip_accuracy, clip_score, clip_similarities, zero_shot
from .extra import EXTRA, require
from .features import FeatureExtractor, InceptionFeatures, ProbeFeatures, features_of
from .frechet import FID, fid
from .image_text import ImageText, OpenClip, ProbeImageText, TransformersClip
from .kernel import KID, kid
from .mean import Mean
from .perceptual import LPIPS, PairDistance, ProbeDistance, layer_distance, perceptual_distance

__all__ = [
    "EXTRA",
    "FID",
    "KID",
    "LPIPS",
    "FeatureExtractor",
    "ImageText",
    "InceptionFeatures",
    "Mean",
    "OpenClip",
    "PairDistance",
    "ProbeDistance",
    "ProbeFeatures",
    "ProbeImageText",
    "TransformersClip",
    "clip_accuracy",
    "clip_score",
    "clip_similarities",
    "features_of",
    "fid",
    "kid",
    "layer_distance",
    "perceptual_distance",
    "require",
    "zero_shot",
]
