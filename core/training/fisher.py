"""Diagonal Fisher information of projections: accumulated in fp32, resumable, cached in a work folder.

``F_i = 1/N Σ_n (1/T Σ_t ∂ℓ_{n,t}/∂θ_i)²`` with ``ℓ_{n,t} = mean (ε − ε_θ(x_t, t, c))²`` over the latent's elements: the
squared gradient of a sample's expected denoising loss, at the base weights. Selective Amnesia (arXiv 2305.10120, §3)
uses sums where this uses means, so its ``F`` is a constant times this one. With means, a value does not depend on the
size of the latents or on the number of time steps.

The sum over time steps is inside the square. Replacing it by a sum over a few random steps is biased
(``E[ĝ²] = g² + Var ĝ``), and for most weights the variance dominates. Therefore ``"halves"`` divides the ``T`` time
steps into ``m`` strata of ``L = T/m`` neighbours and draws two different steps of each: one for a first half with the
gradient sum ``A``, one for a second half with ``B``. With ``s_k²`` the variance within a stratum,
``E[(A − B)²] = 2 Σ s_k²``, while ``(L/2)(A + B)`` estimates ``g = Σ_t g_t`` with the variance
``(L/2)² (1 − 2/L) 2 Σ s_k²``, as no step is drawn twice. Hence

``(L/2)² [(A + B)² − (1 − 2/L)(A − B)²] = L² A·B + (L/2)(A − B)²``

has expectation ``g²`` for every ``m`` down to 1, and is ``g²`` itself at ``L = 2``. The product of the two halves
alone, ``L² A·B``, would miss a part of every step's own square. ``"pairs"`` replaces ``(A − B)²`` by
``Σ_k (a_k − b_k)²``, its mean over all assignments of the drawn steps to the halves: the same passes and expectation,
less variance.

The estimate of a single sample can be negative. It is accumulated as it is, and only the mean over all samples is
clamped at zero. :attr:`Fisher.added` reports how much clamping adds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ModelError, RequestError
from ..files.workspace import Workspace, key_of
from ..models.latent_diffusion import LatentDiffusion
from ..models.text_encoders import EncodedPrompts
from ..models.text_states import TextStates
from ..progress import Progress, ProgressEvent, report_progress
from .frozen import frozen
from .linear_capture import LinearCapture

__all__ = ["ESTIMATORS", "Fisher", "FisherSettings", "FisherSum", "fisher_information", "fisher_key", "square_of_sum"]

Estimator = Literal["exact", "halves", "pairs"]
ESTIMATORS: tuple[Estimator, ...] = ("exact", "halves", "pairs")
KIND = "fisher"
_COUNT = "samples"
_CHUNK = 8  # images generated at a time; always whole chunks, so that resuming generates the same ones
_SAVE_EVERY = 32
_MESSAGE = "measuring Fisher information"


@dataclass(frozen=True)
class FisherSettings:
    """How Fisher information is measured.

    Args:
        estimator: ``"exact"`` uses all ``T`` time steps of a sample, ``"halves"`` and ``"pairs"`` ``2 · draws``.
        samples: Number of samples ``N``.
        times: Number of time steps ``T``, evenly spread over the schedule; ``None``: all of them.
        draws: Number of strata ``m``, which must divide ``T``.
        batch: Time steps of one sample per pass; affects memory, and the result only by rounding.
        sample_steps: Sampling steps of generated images.
        guidance: Guidance scale of generated images; ``None``: the model's default.
        seed: Seed of images, time steps and noise.

    Raises:
        RequestError: A value is out of range.
    """

    estimator: Estimator = "halves"
    samples: int = 128
    times: int | None = None
    draws: int = 5
    batch: int = 10
    sample_steps: int = 20
    guidance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise RequestError(
                f"The Fisher estimator '{self.estimator}' is not known: choose one of {', '.join(ESTIMATORS)}."
            )
        for name in ("samples", "draws", "sample_steps"):
            if getattr(self, name) < 1:
                raise RequestError(f"The Fisher information's number of {name.replace('_', ' ')} must be at least 1.")
        if self.batch < 2 or (self.times is not None and self.times < 1):
            raise RequestError(
                "The Fisher information's batch must be at least 2, and its number of time steps at least 1 or null."
            )

    def time_steps(self, train_steps: int) -> list[int]:
        """The ``T`` time steps, each in the middle of its share of a schedule of ``train_steps``.

        Raises:
            RequestError: There are more than the schedule has, or ``draws`` does not divide them into strata.
        """
        count = train_steps if self.times is None else self.times
        if count > train_steps:
            raise RequestError(
                f"The model has {train_steps} time steps, so Fisher information cannot be measured on {count}: use at "
                "most as many as it has."
            )
        if self.estimator != "exact" and (count % self.draws or count // self.draws < 2):
            raise RequestError(
                f"{count} time steps cannot be divided into {self.draws} equal strata of two or more: choose a number "
                f"of draws that divides {count} and is at most half of it."
            )
        return [(2 * i + 1) * train_steps // (2 * count) for i in range(count)]


@dataclass(frozen=True)
class Fisher:
    """A measured diagonal.

    Args:
        values: By canonical key ``(d_out, d_in)``, fp32 on the CPU, not negative.
        samples: Number of samples.
        negative: Share of weights whose estimate was negative and clamped; 0 for the exact estimator.
        added: How much clamping added to the sum of all values, relative to that sum; 0 for the exact estimator.
    """

    values: Mapping[str, Tensor]
    samples: int
    negative: float = 0.0
    added: float = 0.0


def square_of_sum(total: Tensor, scatter: Tensor, stratum: int) -> Tensor:
    """``(L/2)² [S² − (1 − 2/L) R]``, an unbiased estimate of ``(Σ_t g_t)²``.

    It is also unbiased for a single stratum of ``T`` steps with ``m`` draws per half, where ``L = T/m`` and
    ``R = (A − B)²``.

    Args:
        total: ``S = A + B``.
        scatter: ``R``: ``(A − B)²``, or the sum of the strata's ``(a_k − b_k)²``.
        stratum: ``L``, the number of steps per stratum, of which two different ones were drawn.
    """
    return (stratum / 2) ** 2 * (total.square() - (1 - 2 / stratum) * scatter)


class FisherSum:
    """Running sum over samples, which can be saved and restored.

    The time steps and the noise of sample ``n`` depend on ``(seed, n)`` alone, and the noise of a time step is the same
    for every estimator. So a restored sum continues bit-exactly, and the other estimators are unbiased for what
    ``"exact"`` measures on the same samples. Only one sample's gradient is in memory at a time.

    Args:
        model: The base model.
        keys: Canonical keys of the projections.
        settings: How to measure.

    Raises:
        ModelError: There is no key, or a projection does not exist.
        RequestError: As :meth:`FisherSettings.time_steps`.
    """

    def __init__(self, model: LatentDiffusion, keys: Sequence[str], settings: FisherSettings) -> None:
        if not keys:
            raise ModelError("There is nothing to measure: choose at least one projection.")
        self.model, self.settings = model, settings
        self.count, self.passes = 0, 0
        self.linears = {key: model.survey.linear(key) for key in keys}
        self.times = settings.time_steps(model.train_steps)
        self.stratum = 2 if settings.estimator == "exact" else len(self.times) // settings.draws
        with torch.inference_mode(False):  # inference tensors of a host could not be updated outside of it
            self._sums = {
                key: torch.zeros(linear.weight.shape, device=linear.weight.device)
                for key, linear in self.linears.items()
            }
        self._scale = 1.0

    def add(self, latent: Tensor, states: TextStates, progress: Progress | None = None) -> None:
        """Add one sample; ``passes`` counts the time steps that were evaluated.

        Args:
            latent: A clean latent, ``(1, 4, h, w)``.
            states: The text states of its prompt, one row.
            progress: Called before every pass, of which the exact estimator makes many; may raise :class:`Cancelled`,
                and the sample is then not added.

        Raises:
            ModelError: A gradient is not finite, or a projection is not used exactly once per pass.
        """
        exact = self.settings.estimator == "exact"
        rows = list(range(len(self.times))) if exact else self._draw_steps(self.count)
        size = self.settings.batch if exact else self.settings.batch // 2 * 2
        # the gradient of a mean underflows in half precision: scale it up, and down again if it overflows
        self._scale = float(2**14) if self.model.dtype == torch.float16 else 1.0
        with frozen(self.model.unet):
            totals = {key: torch.zeros_like(total) for key, total in self._sums.items()}
            scatter = {} if exact else {key: torch.zeros_like(total) for key, total in self._sums.items()}
            latent, hidden, pooled = latent.clone(), states.hidden.clone(), states.pooled
            states = TextStates(hidden, None if pooled is None else pooled.clone())
            for start in range(0, len(rows), size):
                report_progress(progress, ProgressEvent(self.count, self.settings.samples, message=_MESSAGE))
                chunk = rows[start : start + size]
                for key, (x, g) in self._gradients(latent, states, chunk).items():
                    totals[key] += _product(x, g)
                    if self.settings.estimator == "halves":
                        scatter[key] += _product(x, _alternating(g))
                    elif self.settings.estimator == "pairs":
                        for pair in range(0, len(chunk), 2):
                            scatter[key] += _product(x[pair : pair + 2], _alternating(g[pair : pair + 2])).square()
            for key, total in self._sums.items():
                if self.settings.estimator == "halves":
                    scatter[key].square_()
                total += self._square(totals[key], scatter.get(key)) / len(self.times) ** 2
        self.count += 1
        self.passes += len(rows)

    def _square(self, total: Tensor, scatter: Tensor | None) -> Tensor:
        return total.square() if scatter is None else square_of_sum(total, scatter, self.stratum)

    def _draw_steps(self, sample: int) -> list[int]:
        """Indices into ``times``: for every stratum one for the first half, then a different one for the second."""
        generator = torch.Generator().manual_seed(_seed(self.settings.seed, sample, "times"))
        size, count = self.stratum, self.settings.draws
        first = torch.randint(size, (count,), generator=generator)
        second = (first + torch.randint(1, size, (count,), generator=generator)) % size
        starts = torch.arange(count) * size
        return torch.stack([starts + first, starts + second], 1).flatten().tolist()

    def _gradients(self, latent: Tensor, states: TextStates, rows: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
        """By key the inputs ``(len(rows), n, d_in)`` and the gradients at the outputs ``(len(rows), n, d_out)``."""
        model = self.model
        times = torch.tensor([self.times[row] for row in rows])
        noise = torch.stack([self._noise(row) for row in rows]).to(model.device)
        x = model.add_noise(latent.to(model.device).float().expand(len(rows), -1, -1, -1), noise, times)
        with LinearCapture(self.linears).attached() as captured:
            predicted = model.predict_noise(x, times, states.index([0] * len(rows)))
        loss = (predicted - noise).square().mean(dim=tuple(range(1, noise.ndim))).sum()
        inputs, outputs = captured.inputs(len(rows)), captured.outputs()
        while True:
            gradients = torch.autograd.grad(loss * self._scale, outputs, retain_graph=self._scale > 1)
            if all(bool(torch.isfinite(g).all()) for g in gradients):
                break
            if self._scale <= 1:
                raise ModelError(
                    f"Fisher information cannot be measured: a gradient is not finite at sample {self.count + 1}. Run "
                    "the model in full precision."
                )
            self._scale /= 4
        return {
            key: (_by_token(x), _by_token(g) / self._scale)
            for key, x, g in zip(self.linears, inputs, gradients, strict=True)
        }

    def _noise(self, row: int) -> Tensor:
        seed = _seed(self.settings.seed, self.count, self.times[row])
        return torch.randn(self.model.latent_shape, generator=torch.Generator().manual_seed(seed))

    def state(self) -> dict[str, Tensor]:
        """The sums and the number of samples, copied to the CPU."""
        sums = {key: total.detach().to("cpu", copy=True) for key, total in self._sums.items()}
        return {**sums, _COUNT: torch.tensor(self.count)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a :meth:`state` of the same model, keys and settings.

        Raises:
            ModelError: The state is of other projections.
        """
        shapes = {key: total.shape for key, total in self._sums.items()}
        if {key: total.shape for key, total in state.items() if key != _COUNT} != shapes or _COUNT not in state:
            raise ModelError("This Fisher information is not of the chosen projections: measure it again.")
        for key, total in self._sums.items():
            total.copy_(state[key])
        self.count = int(state[_COUNT])

    def result(self) -> Fisher:
        """The mean over the samples so far, clamped at zero.

        Raises:
            ModelError: No sample was added, or all values are zero.
        """
        if self.count == 0:
            raise ModelError("There is no Fisher information yet: add at least one sample.")
        # on the CPU, because not every device supports the fp64 below
        means = {key: total.cpu() / self.count for key, total in self._sums.items()}
        below = sum(int((mean < 0).sum()) for mean in means.values())
        before = sum(float(mean.sum(dtype=torch.float64)) for mean in means.values())
        values = {key: mean.clamp(min=0) for key, mean in means.items()}
        after = sum(float(value.sum(dtype=torch.float64)) for value in values.values())
        if after <= 0:
            raise ModelError(
                f"The Fisher information of {self.count} samples is zero everywhere: use more samples or more draws."
            )
        return Fisher(
            values,
            self.count,
            below / sum(value.numel() for value in values.values()),
            (after - before) / before if before > 0 else math.inf,
        )


def _by_token(x: Tensor) -> Tensor:
    """fp32 ``(rows, n, d)``; a layer that reads one vector of the whole prompt has ``n`` = 1."""
    return (x if x.ndim == 3 else x[:, None]).float()


def _product(x: Tensor, g: Tensor) -> Tensor:
    """The gradient of a linear layer's weight, ``(d_out, d_in)``, summed over rows and tokens."""
    return g.flatten(0, -2).T @ x.flatten(0, -2)


def _alternating(g: Tensor) -> Tensor:
    """``g`` with every second row negated."""
    signs = torch.ones(len(g), device=g.device)
    signs[1::2] = -1
    return g * signs[:, None, None]


def _seed(*parts: object) -> int:
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") // 2


def fisher_key(
    model: LatentDiffusion,
    keys: Sequence[str],
    prompts: Sequence[str],
    settings: FisherSettings,
    latents: Tensor | None = None,
) -> str:
    """Key of the cached file: a hash of the model, the projections, the prompts, the latents and the settings.

    The number of samples is not part of it, because samples can be added to a file; nor are settings that only affect
    speed.
    """
    plain: dict[str, Any] = dataclasses.asdict(settings)
    ignored = {"samples", "batch"} | ({"draws"} if settings.estimator == "exact" else set())
    ignored |= {"sample_steps", "guidance"} if latents is not None else set()
    used = {name: value for name, value in plain.items() if name not in ignored}
    if "guidance" in used:
        used["guidance"] = _guidance(model, settings)
    encoding = [model.text_layer, list(model.latent_shape)]
    return key_of(model.model_hash, encoding, sorted(keys), list(prompts), used, [] if latents is None else latents)


def fisher_information(
    model: LatentDiffusion,
    keys: Sequence[str],
    prompts: Sequence[str],
    settings: FisherSettings | None = None,
    latents: Tensor | None = None,
    workspace: Workspace | None = None,
    progress: Progress | None = None,
) -> Fisher:
    """Measure the Fisher information of some projections.

    Args:
        model: The base model.
        keys: Canonical keys of the projections.
        prompts: Sample ``n`` uses the prompt ``n mod len(prompts)``.
        settings: How to measure.
        latents: Clean latents, ``(samples, 4, h, w)``; ``None``: the model generates them.
        workspace: Folder of cached results. A finished one is read; one that was interrupted, or has fewer samples, is
            continued to the same result.
        progress: Called with every sample; may raise :class:`Cancelled`.

    Returns:
        The diagonal of every projection.

    Raises:
        RequestError: There are too few latents or no prompt.
        ModelError: The cached file is of another model, or as :meth:`FisherSum.add`.

    Reference:
        Heng & Soh, Selective Amnesia, arXiv 2305.10120, §3.
    """
    settings = settings or FisherSettings()
    if not prompts:
        raise RequestError("Fisher information is measured on images of prompts: give at least one prompt.")
    if latents is not None and (len(latents) < settings.samples or latents.shape[1:] != model.latent_shape):
        raise RequestError(
            f"Latents of the shape {tuple(latents.shape)} do not make {settings.samples} samples of the shape "
            f"{tuple(model.latent_shape)}: give one latent per sample."
        )
    total = FisherSum(model, keys, settings)
    name = fisher_key(model, keys, prompts, settings, latents)
    found = None if workspace is None else _load(workspace, name, model, total)
    if found is not None and int(found[_COUNT]) <= settings.samples:
        total.restore(found)
    elif found is not None:  # of more samples: ignored, because the result must not depend on what was cached
        workspace = None
    saved = total.count

    def save() -> None:
        nonlocal saved
        if workspace is not None and total.count > saved:
            about = {"base_model": model.model_hash, "base_name": model.name, "samples": str(total.count)}
            workspace.save(KIND, name, total.state(), **about, settings=json.dumps(dataclasses.asdict(settings)))
            saved = total.count

    try:
        for latent, states in _samples(model, prompts, settings, latents, total.count, progress):
            total.add(latent, states, progress)
            if total.count % _SAVE_EVERY == 0:
                save()
            report_progress(progress, ProgressEvent(total.count, settings.samples, message=_MESSAGE))
    finally:  # also when cancelled
        save()
    return total.result()


def _guidance(model: LatentDiffusion, settings: FisherSettings) -> float:
    return model.guidance if settings.guidance is None else settings.guidance


def _load(workspace: Workspace, name: str, model: LatentDiffusion, total: FisherSum) -> dict[str, Tensor] | None:
    found = workspace.load(KIND, name, {name: tuple(tensor.shape) for name, tensor in total.state().items()})
    if found is not None and int(found[_COUNT]) < 0:
        workspace.discard(KIND, name, "it says that fewer than no samples were measured")
        return None
    if found is not None and workspace.metadata(KIND, name).get("base_model") != model.model_hash:
        raise ModelError(
            f"The Fisher information in '{workspace.path(KIND, name)}' was measured on another model than "
            f"'{model.name}': remove the file, or use another work folder."
        )
    return found


def _samples(
    model: LatentDiffusion,
    prompts: Sequence[str],
    settings: FisherSettings,
    latents: Tensor | None,
    start: int,
    progress: Progress | None,
) -> Iterator[tuple[Tensor, TextStates]]:
    """The samples from number ``start`` on, generated in whole chunks."""
    if start == settings.samples:
        return
    # all prompts, wherever the measurement is resumed
    encoded = EncodedPrompts(model.text, prompts, progress=progress)
    for first in range(start - start % _CHUNK, settings.samples, _CHUNK):
        rows = range(first, first + _CHUNK)
        texts = [prompts[n % len(prompts)] for n in rows]
        if latents is None:
            seeds = [_seed(settings.seed, n, "picture") for n in rows]
            guidance = _guidance(model, settings)
            drawn = model.sample(
                texts,
                seeds,
                settings.sample_steps,
                guidance,
                progress=progress,
                batch=_CHUNK,
                sampler="dpm++",
                encoded=encoded,
            )
        else:
            drawn = latents[first : first + _CHUNK]
        states = encoded.states(texts)
        for i, n in enumerate(rows):
            if start <= n < settings.samples:
                yield drawn[i : i + 1], states.index([i])
