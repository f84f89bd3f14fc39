"""Diagonal Fisher information of chosen projections: streamed in fp32, resumable, kept in a work folder.

``F_i = 1/N Σ_n (1/T Σ_t ∂ℓ_{n,t}/∂θ_i)²`` with ``ℓ_{n,t} = mean (ε − ε_θ(x_t, t, c))²`` over the latent's elements: the
squared gradient of a sample's expected denoising loss, at the base weights. Selective Amnesia (arXiv 2305.10120, §3)
sums where this takes means, so its ``F`` is a constant times this one; with means a value does not depend on the size
of a latent or on the number of listed time steps.

The square stands around the sum over time steps. Fewer steps, drawn, in its place measure their own scatter too
(``E[ĝ²] = g² + Var ĝ``), which for most weights is the greater part. So ``"halves"`` cuts the ``T`` listed steps into
``m`` strata of ``L = T/m`` neighbours and draws two different steps of each: one for a first half with the gradient
sum ``A``, one for a second half with ``B``. With ``s_k²`` a stratum's variance, ``E[(A − B)²] = 2 Σ s_k²``, while
``(L/2)(A + B)`` estimates ``g = Σ_t g_t`` with the variance ``(L/2)² (1 − 2/L) 2 Σ s_k²``, as no step is drawn twice.
Hence

``(L/2)² [(A + B)² − (1 − 2/L)(A − B)²] = L² A·B + (L/2)(A − B)²``

has the expectation ``g²`` exactly, for every ``m`` down to 1; it is ``g²`` itself at ``L = 2``. The product of the two
halves alone, ``L² A·B``, would miss a part of every step's own square. ``"pairs"`` puts ``Σ_k (a_k − b_k)²``, the mean
of ``(A − B)²`` over all ways to share the drawn steps out, in its place: the same passes, the same expectation, less
scatter.

A single sample's estimate can be negative; it is added up as it is, and only the mean over all samples is clamped at
zero. What that adds is reported (:attr:`Fisher.added`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ModelError, RequestError
from ..files.workspace import Workspace, key_of
from ..models.latent_diffusion import LatentDiffusion
from ..models.text_encoders import EncodedPrompts, TextStates
from ..progress import Progress, ProgressEvent, report_progress
from .frozen import frozen

__all__ = ["ESTIMATORS", "Fisher", "FisherSettings", "FisherSum", "fisher_information", "fisher_key", "square_of_sum"]

Estimator = Literal["exact", "halves", "pairs"]
ESTIMATORS: tuple[Estimator, ...] = ("exact", "halves", "pairs")
KIND = "fisher"
_COUNT = "samples"
_CHUNK = 8  # pictures made at a time; always whole chunks, so that going on later gives the same ones
_SAVE_EVERY = 32


@dataclass(frozen=True)
class FisherSettings:
    """How Fisher information is measured.

    ``samples``: ``N``. ``times``: ``T``, evenly spread over the model's schedule (``None``: every one of its steps).
    ``estimator``: ``"exact"`` goes through all of them, ``"halves"`` and ``"pairs"`` through ``2 · draws`` a sample,
    where ``draws`` is ``m`` and must divide ``T``. ``batch``: time steps of one sample in one pass (memory; the result
    is the same up to rounding). Pictures made by the model take ``sample_steps`` at ``guidance``, ``None`` for the
    model's usual one.
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

    def listed(self, train_steps: int) -> list[int]:
        """The ``T`` listed time steps, each in the middle of its share of the schedule.

        Raises :class:`RequestError` where there are more than the schedule has, or ``draws`` cannot share them out.
        """
        count = train_steps if self.times is None else self.times
        if count > train_steps:
            raise RequestError(f"The model has {train_steps} time steps, so {count} of them cannot be listed.")
        if self.estimator != "exact" and (count % self.draws or count // self.draws < 2):
            raise RequestError(
                f"{count} time steps cannot be cut into {self.draws} equal strata of two or more: choose a number of "
                f"draws that divides {count} and is at most half of it."
            )
        return [(2 * i + 1) * train_steps // (2 * count) for i in range(count)]


@dataclass(frozen=True)
class Fisher:
    """A measured diagonal: ``values`` by canonical key, each ``(d_out, d_in)``, fp32 on the CPU, nowhere negative.

    ``samples`` is ``N``. ``negative`` is the share of weights whose estimate had to be clamped, ``added`` what clamping
    added to the sum of all values, relative to the sum before (both 0 for the exact one).
    """

    values: Mapping[str, Tensor]
    samples: int
    negative: float = 0.0
    added: float = 0.0


def square_of_sum(total: Tensor, scatter: Tensor, stratum: int) -> Tensor:
    """``(L/2)² [S² − (1 − 2/L) R]``, unbiased for ``(Σ_t g_t)²``.

    ``total``: ``S = A + B``. ``scatter``: ``R``, either ``(A − B)²`` or the sum of the strata's ``(a_k − b_k)²``.
    ``stratum``: ``L``, steps a stratum, of each of which two different ones were drawn. With a single stratum of ``T``
    steps and ``m`` draws for each half, ``L = T/m`` and ``R = (A − B)²`` make it unbiased too.
    """
    return (stratum / 2) ** 2 * (total.square() - (1 - 2 / stratum) * scatter)


class FisherSum:
    """The running sum over samples: :meth:`add` one, :meth:`state` and :meth:`restore` to go on later.

    ``keys`` are canonical projections. Sample ``n`` draws its time steps and noise from ``(seed, n)`` alone, the noise
    of a time step whatever the estimator: so going on after ``restore`` gives the same as never having stopped, and the
    estimators are unbiased for exactly what ``"exact"`` finds on the same samples. At no time is there more than one
    sample's gradient.
    """

    def __init__(self, model: LatentDiffusion, keys: Sequence[str], settings: FisherSettings) -> None:
        if not keys:
            raise ModelError("There is nothing to measure: no projection was chosen.")
        self.model, self.settings = model, settings
        self.count, self.passes = 0, 0
        self.linears = {key: model.survey.linear(key) for key in keys}
        self.times = settings.listed(model.train_steps)
        self.stratum = 2 if settings.estimator == "exact" else len(self.times) // settings.draws
        with torch.inference_mode(False):  # a host's inference mode would leave sums that nothing can be added to
            self._sums = {
                key: torch.zeros(linear.weight.shape, device=linear.weight.device)
                for key, linear in self.linears.items()
            }
        self._scale = 1.0

    def add(self, latent: Tensor, states: TextStates) -> None:
        """One more sample: a clean latent ``(1, 4, h, w)`` and its prompt's states (one row).

        ``passes`` counts the time steps that this object went through. Raises :class:`ModelError` where a gradient is
        not finite, and where a projection is used in a way that cannot be followed.
        """
        exact = self.settings.estimator == "exact"
        rows = list(range(len(self.times))) if exact else self._drawn(self.count)
        size = self.settings.batch if exact else self.settings.batch // 2 * 2
        # half precision has no room for the gradient of a mean: scaled up, and down again where that is too much
        self._scale = float(2**14) if self.model.dtype == torch.float16 else 1.0
        with frozen(self.model.unet):
            totals = {key: torch.zeros_like(total) for key, total in self._sums.items()}
            spread = {} if exact else {key: torch.zeros_like(total) for key, total in self._sums.items()}
            latent, hidden, pooled = latent.clone(), states.hidden.clone(), states.pooled
            states = TextStates(hidden, None if pooled is None else pooled.clone())
            for start in range(0, len(rows), size):
                chunk = rows[start : start + size]
                for key, (x, g) in self._gradients(latent, states, chunk).items():
                    totals[key] += _product(x, g)
                    if self.settings.estimator == "halves":
                        spread[key] += _product(x, _alternating(g))
                    elif self.settings.estimator == "pairs":
                        for pair in range(0, len(chunk), 2):
                            spread[key] += _product(x[pair : pair + 2], _alternating(g[pair : pair + 2])).square()
            for key, total in self._sums.items():
                if self.settings.estimator == "halves":
                    spread[key].square_()
                total += self._square(totals[key], spread.get(key)) / len(self.times) ** 2
        self.count += 1
        self.passes += len(rows)

    def _square(self, total: Tensor, scatter: Tensor | None) -> Tensor:
        return total.square() if scatter is None else square_of_sum(total, scatter, self.stratum)

    def _drawn(self, sample: int) -> list[int]:
        """Places in ``times``: of every stratum one for the first half, then another for the second."""
        generator = torch.Generator().manual_seed(_seed(self.settings.seed, sample, "times"))
        size, count = self.stratum, self.settings.draws
        first = torch.randint(size, (count,), generator=generator)
        second = (first + torch.randint(1, size, (count,), generator=generator)) % size
        starts = torch.arange(count) * size
        return torch.stack([starts + first, starts + second], 1).flatten().tolist()

    def _gradients(self, latent: Tensor, states: TextStates, rows: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
        """For each key the inputs and the gradients at the outputs, ``(len(rows), n, d_in)`` and ``(…, d_out)``."""
        model = self.model
        times = torch.tensor([self.times[row] for row in rows])
        noise = torch.stack([self._noise(row) for row in rows]).to(model.device)
        x = model.add_noise(latent.to(model.device).float().expand(len(rows), -1, -1, -1), noise, times)
        with _Taps(self.linears).attached() as taps:
            predicted = model.predict_noise(x, times, states.index([0] * len(rows)))
        loss = (predicted - noise).square().mean(dim=tuple(range(1, noise.ndim))).sum()
        inputs, outputs = taps.inputs(len(rows)), taps.outputs()
        while True:
            gradients = torch.autograd.grad(loss * self._scale, outputs, retain_graph=self._scale > 1)
            if all(bool(torch.isfinite(g).all()) for g in gradients):
                break
            if self._scale <= 1:
                raise ModelError(
                    f"The Fisher information broke down at sample {self.count + 1}: a gradient is not a finite number. "
                    "Run the model in full precision."
                )
            self._scale /= 4
        return {
            key: (x.float(), g.float() / self._scale) for key, x, g in zip(self.linears, inputs, gradients, strict=True)
        }

    def _noise(self, row: int) -> Tensor:
        seed = _seed(self.settings.seed, self.count, self.times[row])
        return torch.randn(self.model.latent_shape, generator=torch.Generator().manual_seed(seed))

    def state(self) -> dict[str, Tensor]:
        """The sums and the number of samples in them, copied to the CPU."""
        sums = {key: total.detach().to("cpu", copy=True) for key, total in self._sums.items()}
        return {**sums, _COUNT: torch.tensor(self.count)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state` of the same model, keys and settings.

        Raises :class:`ModelError` where it is not one of these projections.
        """
        shapes = {key: total.shape for key, total in self._sums.items()}
        if {key: total.shape for key, total in state.items() if key != _COUNT} != shapes or _COUNT not in state:
            raise ModelError("This Fisher information is not of the projections that are asked for: make it anew.")
        for key, total in self._sums.items():
            total.copy_(state[key])
        self.count = int(state[_COUNT])

    def result(self) -> Fisher:
        """The mean over the samples so far, clamped at zero. Raises :class:`ModelError` where there are none."""
        if self.count == 0:
            raise ModelError("There is no Fisher information yet: no sample was added.")
        means = {key: total.cpu() / self.count for key, total in self._sums.items()}  # fp64 is not on every device
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


def _product(x: Tensor, g: Tensor) -> Tensor:
    """The gradient of a linear layer's weight, summed over rows and tokens: ``(d_out, d_in)``."""
    return g.flatten(0, -2).T @ x.flatten(0, -2)


def _alternating(g: Tensor) -> Tensor:
    """Every second row with the other sign."""
    signs = torch.ones(len(g), device=g.device)
    signs[1::2] = -1
    return g * signs[:, None, None]


def _seed(*parts: object) -> int:
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") // 2


class _Taps:
    """What goes into some projections and what comes out, the latter differentiable although every weight is frozen."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self._linears = linears
        self._calls: dict[str, list[tuple[Tensor, Tensor]]] = {key: [] for key in linears}

    @contextmanager
    def attached(self) -> Iterator[_Taps]:
        hooks: list[RemovableHandle] = []
        try:
            for key, linear in self._linears.items():
                hooks.append(linear.register_forward_hook(self._tap(key)))
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _tap(self, key: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def tap(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            self._calls[key].append((args[0].detach(), output))
            return output

        return tap

    def inputs(self, rows: int) -> list[Tensor]:
        for key, calls in self._calls.items():
            if len(calls) != 1 or calls[0][0].ndim != 3 or len(calls[0][0]) != rows:
                raise ModelError(
                    f"The projection '{key}' is not used once a pass, on the whole batch, in this model: its Fisher "
                    "information cannot be measured."
                )
        return [calls[0][0] for calls in self._calls.values()]

    def outputs(self) -> list[Tensor]:
        return [calls[0][1] for calls in self._calls.values()]


def fisher_key(
    model: LatentDiffusion,
    keys: Sequence[str],
    prompts: Sequence[str],
    settings: FisherSettings,
    latents: Tensor | None = None,
) -> str:
    """What the file is called: of the base model, the projections, the prompts, given latents and the settings.

    The number of samples is not in it, for a file can be added to; nor is what changes nothing but speed.
    """
    plain: dict[str, Any] = dataclasses.asdict(settings)
    left_out = {"samples", "batch"} | ({"draws"} if settings.estimator == "exact" else set())
    left_out |= {"sample_steps", "guidance"} if latents is not None else set()
    used = {name: value for name, value in plain.items() if name not in left_out}
    if "guidance" in used:
        used["guidance"] = _guidance(model, settings)
    read = [model.text_layer, list(model.latent_shape)]
    return key_of(model.model_hash, read, sorted(keys), list(prompts), used, [] if latents is None else latents)


def fisher_information(
    model: LatentDiffusion,
    keys: Sequence[str],
    prompts: Sequence[str],
    settings: FisherSettings | None = None,
    latents: Tensor | None = None,
    workspace: Workspace | None = None,
    progress: Progress | None = None,
) -> Fisher:
    """Fisher information of ``keys`` on ``settings.samples`` samples.

    Sample ``n`` has the prompt ``n mod len(prompts)`` and the latent ``n``; without ``latents`` ``(samples, 4, h, w)``
    the model itself draws them. With a ``workspace`` a finished file is read in place of any pass, an unfinished one
    (cancelled, or of fewer samples) is gone on with, to the same result. ``progress`` counts samples and may cancel.

    Raises :class:`RequestError` on too few latents or no prompt, :class:`ModelError` for a file of another model, and
    as :meth:`FisherSum.add`.
    """
    settings = settings or FisherSettings()
    if not prompts:
        raise RequestError("Fisher information is measured on pictures of prompts: give at least one prompt.")
    if latents is not None and (len(latents) < settings.samples or latents.shape[1:] != model.latent_shape):
        raise RequestError(
            f"Latents of the shape {tuple(latents.shape)} do not make {settings.samples} samples of "
            f"{tuple(model.latent_shape)}."
        )
    total = FisherSum(model, keys, settings)
    name = fisher_key(model, keys, prompts, settings, latents)
    found = None if workspace is None else _read(workspace, name, model)
    if found is not None and int(found.get(_COUNT, torch.tensor(0))) <= settings.samples:
        total.restore(found)
    elif found is not None:  # of more samples: left as it is, for the result must not depend on what was made before
        workspace = None
    kept = total.count

    def keep() -> None:
        nonlocal kept
        if workspace is not None and total.count > kept:
            said = {"base_model": model.model_hash, "base_name": model.name, "samples": str(total.count)}
            workspace.save(KIND, name, total.state(), **said, settings=json.dumps(dataclasses.asdict(settings)))
            kept = total.count

    try:
        for latent, states in _samples(model, prompts, settings, latents, total.count, progress):
            total.add(latent, states)
            if total.count % _SAVE_EVERY == 0:
                keep()
            report_progress(
                progress, ProgressEvent(total.count, settings.samples, message="measuring Fisher information")
            )
    finally:  # cancelled or broken off: what was done is kept
        keep()
    return total.result()


def _guidance(model: LatentDiffusion, settings: FisherSettings) -> float:
    return model.guidance if settings.guidance is None else settings.guidance


def _read(workspace: Workspace, name: str, model: LatentDiffusion) -> dict[str, Tensor] | None:
    found = workspace.load(KIND, name)
    if found is not None and workspace.metadata(KIND, name).get("base_model") != model.model_hash:
        raise ModelError(
            f"The Fisher information in '{workspace.path(KIND, name)}' was measured on another model than "
            f"'{model.name}': remove it, or use another work folder."
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
    """The samples from number ``start`` on, made a whole chunk at a time."""
    if start == settings.samples:
        return
    encoded = EncodedPrompts(model.text, prompts)  # of all prompts, wherever the measurement goes on
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
