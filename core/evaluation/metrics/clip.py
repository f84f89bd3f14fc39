"""CLIP score and CLIP accuracy: do pictures show what words say?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...errors import RequestError
from ...progress import Progress, ProgressEvent, report_progress
from ..intervals import Score
from .features import as_images
from .image_text import ImageText
from .mean import Mean

__all__ = ["clip_accuracy", "clip_score", "clip_similarities", "zero_shot"]

# how a classifier is asked where nothing else is said
DEFAULT_TEMPLATES = ("a photo of {}", "a picture of {}")


def _image_features(encoder: ImageText, images: Tensor, batch: int, progress: Progress | None) -> Tensor:
    if batch < 1:
        raise RequestError(f"The batch must be at least 1, not {batch}.")
    if images.ndim != 4 or not len(images):
        as_images(images)  # raises
    found = []
    for start in range(0, len(images), batch):
        found.append(encoder.image_features(as_images(images[start : start + batch])))
        done = min(start + batch, len(images))
        report_progress(
            progress, ProgressEvent(done, len(images), message=f"comparing {len(images)} pictures with words")
        )
    return torch.cat(found)


def _unit(vectors: Tensor) -> Tensor:
    return normalize(vectors.double(), dim=1)


def clip_similarities(
    encoder: ImageText, images: Tensor, prompts: Sequence[str], batch: int = 32, progress: Progress | None = None
) -> Tensor:
    """Cosines ``(n,)``, fp64, of pictures ``(n, 3, H, W)`` (uint8, or in [-1, 1]) and a prompt for each.

    Raises :class:`RequestError` where their numbers differ or the pictures are of another form.
    """
    if len(images) != len(prompts):
        raise RequestError(f"There are {len(images)} pictures and {len(prompts)} prompts: give one prompt a picture.")
    seen = _unit(_image_features(encoder, images, batch, progress))
    rows = list(dict.fromkeys(prompts))
    templates = _unit(_text_features(encoder, rows, batch))
    return (seen * templates[[rows.index(prompt) for prompt in prompts]]).sum(1)


def _text_features(encoder: ImageText, texts: Sequence[str], batch: int) -> Tensor:
    return torch.cat([encoder.text_features(texts[i : i + batch]) for i in range(0, len(texts), batch)])


def clip_score(
    encoder: ImageText, images: Tensor, prompts: Sequence[str], batch: int = 32, progress: Progress | None = None
) -> Mean:
    """CLIP score: the mean of ``100 · max(cos, 0)`` of each picture with its prompt, from 0 to 100.

    Hessel et al. (arXiv 2104.08718), with the factor 100 that is now usual in place of their 2.5. Raises as
    :func:`clip_similarities`.
    """
    return Mean.of(100 * clip_similarities(encoder, images, prompts, batch, progress).clamp(min=0))


def zero_shot(
    encoder: ImageText,
    images: Tensor,
    labels: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch: int = 32,
    progress: Progress | None = None,
) -> list[str]:
    """For each picture the label whose prompts it is most like: Radford et al. (arXiv 2103.00020), §3.1.4.

    ``templates`` are templates with one ``{}``; a label's vector is the mean of its prompts' unit vectors. Raises
    :class:`RequestError` for fewer than two labels, a label twice, and a template without its place.
    """
    labels = list(labels)
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise RequestError("To choose among labels, give at least two of them, each once.")
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise RequestError("The templates of labels must be one or more prompts with exactly one '{}' each.")
    seen = _unit(_image_features(encoder, images, batch, progress))
    prompts = [template.format(label) for label in labels for template in templates]
    vectors = _unit(_text_features(encoder, prompts, batch)).view(len(labels), len(templates), -1).mean(1)
    return [labels[i] for i in (seen @ _unit(vectors).T).argmax(1).tolist()]


def clip_accuracy(
    encoder: ImageText,
    images: Tensor,
    wanted: Sequence[str],
    labels: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch: int = 32,
    progress: Progress | None = None,
) -> Score:
    """CLIP accuracy: the share of pictures that are taken, among ``labels``, for the one ``wanted`` of each.

    Raises :class:`RequestError` as :func:`zero_shot`, and where something is wanted that is no label.
    """
    if len(images) != len(wanted):
        raise RequestError(f"There are {len(images)} pictures and {len(wanted)} labels wanted: give one a picture.")
    if unknown := sorted(set(wanted) - set(labels)):
        raise RequestError(f"'{unknown[0]}' is wanted of a picture and is not among the labels to choose from.")
    found = zero_shot(encoder, images, labels, templates, batch, progress)
    return Score.share([one == other for one, other in zip(found, wanted, strict=True)])
