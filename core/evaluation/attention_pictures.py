"""Attention maps: the share of cross-attention that each image position pays to a phrase during sampling.

Like DAAM (Tang et al. 2022, arXiv 2210.04885), the cross-attention to a phrase's tokens is aggregated over heads, sites
and time steps, with each site's map resized to the latent's size. Here the result is a *share*: the mean instead of the
sum, over the conditional pass only, without rescaling. A value of 0.1 therefore means the same before and after
forgetting, and the shares of all tokens add up to 1 at every position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ModelError, RequestError
from ..models.latent_diffusion import LatentDiffusion
from ..models.token_positions import token_positions
from ..patch.patch import Patch
from ..progress import Progress, ProgressEvent, report_progress
from ..training.attention import AttentionCapture, attention_mass, token_mask
from .drawing import Picture, SamplingSettings, Variant, draw, patched

__all__ = ["AttentionMap", "AttentionPair", "attention_maps", "attention_pairs", "heat", "overlay"]

# opacity of the heat map in an overlay, above the grey image
OPACITY = 0.75


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """The attention to a phrase while an image was sampled.

    Attributes:
        mass: Attention share of each latent position, ``(h, w)``, fp32 in [0, 1]; mean over heads, cross-attention
            sites and time steps.
        picture: The sampled image, ``(3, H, W)``, uint8.
    """

    mass: Tensor
    picture: Tensor

    @property
    def share(self) -> float:
        """The mean of ``mass`` over all positions."""
        return float(self.mass.mean())


@dataclass(frozen=True, eq=False)
class AttentionPair:
    """Attention maps of a phrase without and with patches, for the same prompt and seed."""

    prompt: str
    phrase: str
    seed: int
    before: AttentionMap
    after: AttentionMap

    @property
    def scale(self) -> tuple[float, float]:
        """The lowest and the highest share in both maps, the ends of their common colour scale."""
        lowest, highest = torch.stack([self.before.mass, self.after.mass]).aminmax()
        return float(lowest), float(highest)

    def overlays(self) -> tuple[Tensor, Tensor]:
        """Return both maps over their images, on the common scale; see :func:`overlay`."""
        first, second = (overlay(found.picture, found.mass, *self.scale) for found in (self.before, self.after))
        return first, second

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "phrase": self.phrase,
            "seed": self.seed,
            "scale": list(self.scale),
            "share_before": self.before.share,
            "share_after": self.after.share,
        }


def attention_maps(
    model: LatentDiffusion,
    pictures: Sequence[Picture],
    phrases: Sequence[str],
    patches: Sequence[tuple[Patch, float]] = (),
    sampling: SamplingSettings | None = None,
    progress: Progress | None = None,
    implementation: Literal["sdpa", "reference"] = "sdpa",
) -> list[AttentionMap]:
    """Sample images and record the attention to a phrase of each prompt. The model is restored bit-exactly.

    Args:
        model: The unedited model.
        pictures: Prompts and seeds.
        phrases: One phrase per image; all sub-words of all its occurrences count.
        patches: Patches to apply, each with its strength.
        sampling: Sampling settings. Default: :class:`SamplingSettings`.
        progress: Receives sampling progress.
        implementation: Implementation of the attention mass.

    Raises:
        TokenError: If a phrase does not occur in its prompt.
        RequestError: If there is not one phrase per image.
        ModelError: If the model has no autoencoder, or its attention cannot be recorded.
    """
    if len(pictures) != len(phrases) or not pictures:
        raise RequestError(
            f"There are {len(pictures)} images and {len(phrases)} phrases: give one phrase for each image."
        )
    sampling = (sampling or SamplingSettings()).resolved(model)
    # before sampling, so that a missing phrase fails early
    places = [
        token_positions(model.text, phrase, picture.prompt) for phrase, picture in zip(phrases, pictures, strict=True)
    ]
    found: list[AttentionMap] = []
    # patches first, so that the recorded projections include them
    with patched(model, patches), AttentionCapture(model.survey) as recorder:
        for start in range(0, len(pictures), sampling.batch):
            part = slice(start, start + sampling.batch)
            collector = _Collector(model, recorder, places[part], sampling.guidance != 1.0, implementation)

            def record(event: ProgressEvent, start: int = start, collector: _Collector = collector) -> None:
                if event.step:  # the prompts are encoded before the first step
                    collector.take()
                at = start * sampling.steps + event.step * collector.count
                message = f"recording the attention of {len(pictures)} images"
                report_progress(progress, ProgressEvent(at, len(pictures) * sampling.steps, message=message))

            (images,) = draw(model, pictures[part], Variant(), sampling, record)
            found += [AttentionMap(mass, image) for mass, image in zip(collector.shares(), images, strict=True)]
    return found


def attention_pairs(
    model: LatentDiffusion,
    pictures: Sequence[Picture],
    phrases: Sequence[str],
    patches: Sequence[tuple[Patch, float]],
    sampling: SamplingSettings | None = None,
    progress: Progress | None = None,
) -> list[AttentionPair]:
    """Return the attention maps without and with the patches; see :func:`attention_maps` for arguments and errors."""
    sampling = (sampling or SamplingSettings()).resolved(model)
    half = len(pictures) * sampling.steps

    def second(event: ProgressEvent) -> None:
        report_progress(progress, ProgressEvent(half + event.step, 2 * half, message=event.message))

    def first(event: ProgressEvent) -> None:
        report_progress(progress, ProgressEvent(event.step, 2 * half, message=event.message))

    before = attention_maps(model, pictures, phrases, (), sampling, first)
    after = attention_maps(model, pictures, phrases, patches, sampling, second)
    return [
        AttentionPair(picture.prompt, phrase, picture.seed, b, a)
        for picture, phrase, b, a in zip(pictures, phrases, before, after, strict=True)
    ]


class _Collector:
    """Accumulates the attention shares of one batch over the time steps."""

    def __init__(
        self,
        model: LatentDiffusion,
        recorder: AttentionCapture,
        places: Sequence[Sequence[int]],
        guided: bool,
        implementation: Literal["sdpa", "reference"],
    ) -> None:
        self.recorder, self.implementation = recorder, implementation
        self.count, self.rows = len(places), len(places) * (2 if guided else 1)
        self.size = model.latent_shape[1:]
        # one column that sums over all tokens of the phrase
        mask = token_mask(places, len(model.text.token_ids("")), model.device)
        self.mask = mask.sum(-1, keepdim=True)
        self.total = torch.zeros(self.count, *self.size, device=model.device)
        self.steps = 0

    def take(self) -> None:
        for site in self.recorder.sites:
            q, k = self.recorder.q.get(site.name), self.recorder.k.get(site.name)
            if q is None or k is None or q.shape[0] != self.rows or k.shape[0] != self.rows:
                raise ModelError(
                    f"The attention at {site.name} cannot be recorded, because this model does not process the "
                    f"conditional and unconditional passes of {self.count} images in one batch: use a smaller batch."
                )
            # the conditional rows come first; computed in fp32 at any sampling precision
            with torch.autocast(q.device.type, enabled=False):
                mass = attention_mass(
                    q[: self.count].float(), k[: self.count].float(), self.mask, site.heads, self.implementation
                )
            shares = mass[..., 0].mean(1).unflatten(-1, _grid(mass.shape[2], self.size))
            # bilinear, because a spline would leave [0, 1]
            grown = F.interpolate(shares[:, None], self.size, mode="bilinear", align_corners=False)
            self.total += grown[:, 0] / len(self.recorder.sites)
        self.steps += 1

    def shares(self) -> list[Tensor]:
        """Return the means over the time steps, ``(h, w)`` each, on the CPU."""
        return list((self.total / self.steps).cpu())


def _grid(pixels: int, size: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of a site's map: the latent's size, halved until it matches the number of positions."""
    height, width = size
    while height * width > pixels and height * width > 1:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width != pixels:
        raise ModelError(
            f"A cross-attention map of {pixels} positions does not fit a latent of {size[0]}×{size[1]}: attention maps "
            "are not supported for this model."
        )
    return height, width


# -- colours --------------------------------------------------------------------------------------------------------

# from dark violet through red to pale yellow, in OKLCH (Ottosson 2020): lightness and hue (degrees) are linear between
# the ends; chroma is quadratic, from the first to the second number through the third in the middle
LIGHTNESS, HUE, CHROMA = (0.24, 0.95), (285.0, 465.0), (0.10, 0.09, 0.17)
LEVELS = 256


def _from_oklab(lab: Tensor) -> Tensor:
    """Convert OKLab ``(n, 3)`` to sRGB in [0, 1]."""
    roots = lab @ torch.tensor(
        [[1.0, 1.0, 1.0], [0.3963377774, -0.1055613458, -0.0894841775], [0.2158037573, -0.0638541728, -1.2914855480]],
        dtype=lab.dtype,
    )
    linear = roots**3 @ torch.tensor(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ],
        dtype=lab.dtype,
    )
    # except for rounding, the path lies within the sRGB gamut
    linear = linear.clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@cache
def _table() -> Tensor:
    """Colours at equal steps of *perceived* difference, sRGB ``(LEVELS, 3)``."""
    at = torch.linspace(0, 1, 16 * LEVELS, dtype=torch.float64)
    lightness = LIGHTNESS[0] + (LIGHTNESS[1] - LIGHTNESS[0]) * at
    start, end, middle = CHROMA
    chroma = start * (1 - at) ** 2 + (4 * middle - start - end) * at * (1 - at) + end * at**2
    angle = torch.deg2rad(HUE[0] + (HUE[1] - HUE[0]) * at)
    lab = torch.stack([lightness, chroma * angle.cos(), chroma * angle.sin()], 1)
    way = F.pad((lab[1:] - lab[:-1]).norm(dim=1).cumsum(0), (1, 0))
    nearest = torch.searchsorted(way, torch.linspace(0, 1, LEVELS, dtype=torch.float64) * way[-1]).clamp(
        max=len(at) - 1
    )
    return _from_oklab(lab[nearest]).float()


def heat(values: Tensor) -> Tensor:
    """Map values in [0, 1] (others are clamped) to colours: ``(…)`` to ``(…, 3)``, sRGB in [0, 1].

    Equal steps of value are equal steps of perceived difference (OKLab), and higher values are always lighter, so that
    the maps stay readable in greyscale.
    """
    return _table()[(values.float().nan_to_num().clamp(0, 1) * (LEVELS - 1)).round().long().cpu()]


def overlay(picture: Tensor, mass: Tensor, low: float, high: float) -> Tensor:
    """Overlay an attention map in colour on a grey copy of its image.

    Args:
        picture: Image ``(3, H, W)``, uint8.
        mass: Attention shares ``(h, w)``.
        low: Share with the darkest colour.
        high: Share with the lightest colour.

    Returns:
        The overlay, with the shape and dtype of ``picture``.

    Raises:
        RequestError: If ``low`` and ``high`` are not finite or not in order.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise RequestError(f"The scale of an attention map must rise, not go from {low} to {high}.")
    size = (picture.shape[1], picture.shape[2])
    # the bound avoids a division by zero for a constant map
    values = (mass[None, None].float().cpu() - low) / max(high - low, 1e-12)
    values = F.interpolate(values, size, mode="bilinear")[0, 0]
    grey = (picture.float().cpu() / 255 * torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1, 1)).sum(0, keepdim=True)
    mixed = OPACITY * heat(values).permute(2, 0, 1) + (1 - OPACITY) * grey
    return (mixed * 255).round().to(torch.uint8)
