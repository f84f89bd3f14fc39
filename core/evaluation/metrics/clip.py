"""CLIP score and CLIP accuracy: agreement of images with text."""

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

# default prompt templates of zero-shot classification
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
        report_progress(progress, ProgressEvent(done, len(images), message=f"comparing {len(images)} images with text"))
    return torch.cat(found)


def _unit(vectors: Tensor) -> Tensor:
    return normalize(vectors.double(), dim=1)


def clip_similarities(
    encoder: ImageText, images: Tensor, prompts: Sequence[str], batch: int = 32, progress: Progress | None = None
) -> Tensor:
    """Return the cosine similarity of each image and its prompt.

    Args:
        encoder: Image and text encoder.
        images: Images ``(n, 3, H, W)``, uint8 or in [-1, 1].
        prompts: One prompt per image.
        batch: Images or texts per batch.
        progress: Receives the number of encoded images.

    Returns:
        Similarities ``(n,)``, fp64.

    Raises:
        RequestError: If the numbers of images and prompts differ, or the images have the wrong shape or range.
    """
    if len(images) != len(prompts):
        raise RequestError(f"There are {len(images)} images and {len(prompts)} prompts: give one prompt per image.")
    image_vectors = _unit(_image_features(encoder, images, batch, progress))
    texts = list(dict.fromkeys(prompts))
    text_vectors = _unit(_text_features(encoder, texts, batch))
    return (image_vectors * text_vectors[[texts.index(prompt) for prompt in prompts]]).sum(1)


def _text_features(encoder: ImageText, texts: Sequence[str], batch: int) -> Tensor:
    return torch.cat([encoder.text_features(texts[i : i + batch]) for i in range(0, len(texts), batch)])


def clip_score(
    encoder: ImageText, images: Tensor, prompts: Sequence[str], batch: int = 32, progress: Progress | None = None
) -> Mean:
    """Return the CLIP score: the mean of ``100 · max(cos, 0)`` of each image and its prompt, from 0 to 100.

    Arguments and errors are those of :func:`clip_similarities`.

    Reference: Hessel et al., arXiv 2104.08718, with the now usual factor 100 instead of 2.5.
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
    """Return the most similar label of each image.

    Args:
        encoder: Image and text encoder.
        images: Images ``(n, 3, H, W)``, uint8 or in [-1, 1].
        labels: At least two distinct labels.
        templates: Prompt templates with one ``{}`` each; the normalized text vectors of a label are averaged.
        batch: Images or texts per batch.
        progress: Receives the number of encoded images.

    Raises:
        RequestError: If there are fewer than two distinct labels, a label is repeated, or a template is invalid.

    Reference: Radford et al., arXiv 2103.00020, section 3.1.4.
    """
    labels = list(labels)
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise RequestError("Zero-shot classification needs at least two labels, each given once.")
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise RequestError("The label templates must be one or more prompts with exactly one '{}' each.")
    image_vectors = _unit(_image_features(encoder, images, batch, progress))
    prompts = [template.format(label) for label in labels for template in templates]
    vectors = _unit(_text_features(encoder, prompts, batch)).view(len(labels), len(templates), -1).mean(1)
    return [labels[i] for i in (image_vectors @ _unit(vectors).T).argmax(1).tolist()]


def clip_accuracy(
    encoder: ImageText,
    images: Tensor,
    expected: Sequence[str],
    labels: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch: int = 32,
    progress: Progress | None = None,
) -> Score:
    """Return the CLIP accuracy: the proportion of images that :func:`zero_shot` assigns to their ``expected`` label.

    The other arguments are those of :func:`zero_shot`.

    Raises:
        RequestError: As :func:`zero_shot`, and if there is not one expected label, out of ``labels``, per image.
    """
    if len(images) != len(expected):
        raise RequestError(
            f"There are {len(images)} images and {len(expected)} expected labels: give one label per image."
        )
    if unknown := sorted(set(expected) - set(labels)):
        raise RequestError(
            f"The expected label '{unknown[0]}' is not one of the labels to choose from: add it to them."
        )
    found = zero_shot(encoder, images, labels, templates, batch, progress)
    return Score.share([one == other for one, other in zip(found, expected, strict=True)])
