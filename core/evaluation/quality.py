"""Image quality on the retain set: FID, KID, perceptual distance and CLIP score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .drawing import SampleCache
from .evaluators import Evaluators
from .metrics import clip_score, features_of, fid, kid, perceptual_distance
from .report import Metric
from .scores import PATCHED, UNEDITED, EvaluationPlan

__all__ = ["quality_metrics"]


def quality_metrics(evaluators: Evaluators, cache: SampleCache, plans: Sequence[EvaluationPlan]) -> tuple[Metric, ...]:
    """Image quality on the retain set: each variant against the unedited model on the same prompts and seeds."""
    pairs: dict[str, dict[object, tuple[str, Tensor, Tensor]]] = {}
    for plan in plans:
        for name, variant in plan.variants.items():
            if name == UNEDITED:
                continue
            pictures = [question.picture for question in (*plan.cells.in_domain, *plan.cells.cross_domain)]
            before, after = cache.get(plan.variants[UNEDITED], pictures), cache.get(variant, pictures)
            for picture, was, now in zip(pictures, before, after, strict=True):
                pairs.setdefault(name, {})[variant.key, picture] = (picture.prompt, was.picture, now.picture)
    stacks = {
        name: (
            [prompt for prompt, _, _ in found.values()],
            torch.stack([was for _, was, _ in found.values()]),
            torch.stack([now for _, _, now in found.values()]),
        )
        for name, found in pairs.items()
    }
    n = len(stacks[PATCHED][0])
    note = f"{n} images of the retain set, compared with the unedited model's"
    metrics: list[Metric] = []
    if evaluators.features is not None:
        extractor = evaluators.features
        features = {name: tuple(features_of(extractor, part) for part in parts[1:]) for name, parts in stacks.items()}
        distances = {name: fid(now, was) for name, (was, now) in features.items()}
        metrics.append(
            Metric(
                "FID",
                {name: found.value for name, found in distances.items()},
                n,
                "lower",
                "; ".join(filter(None, (note, distances[PATCHED].note))),
            )
        )
        kernels = {name: kid(now, was) for name, (was, now) in features.items()}
        errors = {name: found.error for name, found in kernels.items() if found.error is not None}
        metrics.append(Metric("KID", {name: found.value for name, found in kernels.items()}, n, "lower", note, errors))
    if evaluators.distance is not None:
        means = {name: perceptual_distance(evaluators.distance, was, now) for name, (_, was, now) in stacks.items()}
        errors = {name: mean.error for name, mean in means.items() if mean.error is not None}
        metrics.append(
            Metric(
                "Perceptual distance",
                {name: mean.value for name, mean in means.items()},
                n,
                "lower",
                f"{evaluators.distance.name}; same prompts and seeds",
                errors,
            )
        )
    if evaluators.image_text is not None:
        prompts, unedited, _ = stacks[PATCHED]
        means = {UNEDITED: clip_score(evaluators.image_text, unedited, prompts)}
        means |= {name: clip_score(evaluators.image_text, now, texts) for name, (texts, _, now) in stacks.items()}
        errors = {name: mean.error for name, mean in means.items() if mean.error is not None}
        metrics.append(
            Metric(
                "CLIP score",
                {name: mean.value for name, mean in means.items()},
                n,
                "higher",
                f"{evaluators.image_text.name}; images of the retain set and their prompts",
                errors,
            )
        )
    return tuple(metrics)
