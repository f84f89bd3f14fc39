"""The model object that methods work on: UNet, text encoder, noise schedule and, optionally, an autoencoder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ForgetConceptError, ModelError, RequestError
from ..files.arrays import tensor_bytes
from ..progress import Progress, ProgressEvent, report_progress
from .autoencoders import Autoencoder
from .finite import check_weights
from .model_survey import PROJECTIONS, ModelSurvey
from .safe_guidance import SafetyGuidance, safety_term
from .sampling_start import ExtraNoise, Start
from .schedules import _log_snr, flow_sigmas, shifted
from .survey import survey
from .text_encoders import EncodedPrompts, TextEncoder
from .text_states import TextStates
from .transformer import TransformerSurvey

__all__ = ["LatentDiffusion", "hash_of_unet", "hash_of_weights", "hashed_keys"]

# flow: the velocity ε - x_0 on the straight line from the picture to the noise
PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")
# α̅ below which a schedule ends in pure noise; implementations write 0, 2⁻²⁴ or 5e-8 there
_PURE_NOISE = 1e-6
# DPM-Solver++ needs a finite signal-to-noise ratio; diffusers' value
_LEAST_ALPHA = 2.0**-24
# below this α̅ a predicted noise no longer tells x_0 in single precision, and the predicted v does
_NOISY = 1e-3
SAMPLERS = ("ddim", "dpm++")


def hash_of_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """:attr:`LatentDiffusion.model_hash` of the weights of all projections by canonical key, in the survey's order."""
    digest = hashlib.sha256()
    for key, weight in weights:
        digest.update(key.encode())
        digest.update(tensor_bytes(weight.detach().to("cpu", torch.float16)))
    return digest.hexdigest()


def hash_of_unet(found: ModelSurvey) -> str:
    """:attr:`LatentDiffusion.model_hash` of a surveyed model, with whatever patches its weights have in them."""
    return hash_of_weights((key, found.linear(key).weight) for key in hashed_keys(found))


def hashed_keys(found: ModelSurvey) -> list[str]:
    """The layers whose weights tell base models apart: those of the cross-attention, else the text entries."""
    if not found.sites:
        return [entry.key for entry in found.entries]
    return [site.key(which) for site in found for which in PROJECTIONS]


class LatentDiffusion:
    """A latent diffusion model, shared by methods, evaluation and hosts. Nothing here changes its weights."""

    def __init__(
        self,
        unet: nn.Module,
        text: TextEncoder,
        alphas_cumprod: Tensor | None,
        prediction_type: str = "epsilon",
        vae: Autoencoder | None = None,
        latent_shape: tuple[int, int, int] = (4, 64, 64),
        name: str = "model",
        model_hash: str | None = None,
        eps_model: Callable[[Tensor, Tensor, TextStates], Tensor] | None = None,
        guidance: float = 7.5,
        spacing: str = "leading",
        shift: float = 1.0,
    ) -> None:
        """Wrap the parts of a model.

        Args:
            unet: The raw UNet or diffusion transformer, in diffusers' or the authors' naming.
            text: The text encoder.
            alphas_cumprod: ``α̅_t``, shape ``(T,)``; ``None`` for a flow model, which has ``σ_t = t / T``.
            prediction_type: ``"epsilon"``, ``"v_prediction"`` or ``"flow"``.
            vae: The autoencoder, if images are to be encoded or decoded.
            latent_shape: ``(channels, h, w)``.
            name: Name of the model in messages and metadata.
            model_hash: :attr:`model_hash`, if it is known already.
            eps_model: ``(x, t, states) -> raw prediction``; replaces the call of the raw UNet where a host has its own.
            guidance: Usual guidance scale of this model.
            spacing: Usual spacing of the sampler's time steps, as in :meth:`timesteps`; a flow model's is "trailing".
            shift: Shift of a flow model's time steps while sampling.

        Raises:
            ModelError: If the prediction type is not supported, or it predicts noise under a schedule that ends in pure
                noise.
        """
        if prediction_type not in PREDICTION_TYPES:
            raise ModelError(
                f"This model predicts '{prediction_type}'; only {' and '.join(PREDICTION_TYPES)} models are supported."
            )
        if alphas_cumprod is None:
            if prediction_type != "flow":
                raise ModelError(f"The model '{name}' comes without its noise schedule: load it with its scheduler.")
            sigmas = flow_sigmas()
            self._signal, self._noise = 1 - sigmas, sigmas
            # of the same signal-to-noise ratio
            alphas_cumprod = self._signal**2 / (self._signal**2 + self._noise**2)
        else:
            alphas_cumprod = alphas_cumprod.detach().float().cpu()
            self._signal, self._noise = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        if prediction_type == "epsilon" and float(alphas_cumprod[-1]) < _PURE_NOISE:
            raise ModelError(
                f"The noise schedule of '{name}' ends in pure noise (zero terminal SNR), where a prediction of the "
                "noise says nothing about the picture: load it as a v-prediction model, or without the rescaled "
                "schedule."
            )
        self.unet, self.text, self.vae = unet, text, vae
        self.alphas_cumprod = alphas_cumprod
        self.prediction_type = prediction_type
        self.latent_shape = tuple(latent_shape)
        self.name = name
        self._known_hash = model_hash
        self._call = eps_model
        self.guidance = guidance
        self.spacing = "trailing" if prediction_type == "flow" else spacing
        self.shift = shift

    # -- properties ----------------------------------------------------------------------------------------------

    @cached_property
    def survey(self) -> ModelSurvey:
        """The model's layers, and where the text enters it."""
        return survey(self.unet)

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def train_steps(self) -> int:
        """Number of training time steps (1000 for every Stable Diffusion)."""
        return self.alphas_cumprod.shape[0]

    @cached_property
    def model_hash(self) -> str:
        """Hash of the cross-attention weights rounded to fp16; equal for full and pruned copies and in both layouts."""
        if self._known_hash is not None:
            return self._known_hash
        return hash_of_unet(self.survey)

    @property
    def text_layer(self) -> str:
        """Which states the text encoder gives, as its ``layer`` says."""
        return str(getattr(self.text, "layer", "unknown"))

    # -- noise ---------------------------------------------------------------------------------------------------

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise of ``x_t = signal x_0 + noise ε``, in the shape of a factor of ``like``."""
        at = timesteps.long().cpu()
        shape = (-1, *([1] * (like.ndim - 1)))
        return self._signal[at].to(like.device).view(shape), self._noise[at].to(like.device).view(shape)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return ``x_t = √α̅_t x_0 + √(1-α̅_t) ε``, of a flow model ``(1-σ_t) x_0 + σ_t ε``.

        ``x0`` and ``noise`` are ``(n, 4, h, w)``, ``timesteps`` ``(n,)``.
        """
        signal, level = self._levels(timesteps, x0)
        return signal * x0 + level * noise

    def predict_noise(self, x: Tensor, timesteps: Tensor, states: TextStates) -> Tensor:
        """Predict the noise ``ε_θ(x_t, t, c)``.

        A v-prediction is converted with ``ε = √α̅ v + √(1-α̅) x_t``, a velocity with ``ε = x_t + (1-σ) v``.
        Differentiable if gradients are enabled.

        Args:
            x: ``x_t``, shape ``(n, 4, h, w)``.
            timesteps: Shape ``(n,)`` or broadcastable to it.
            states: Text states of ``n`` prompts.

        Returns:
            fp32, like ``x``.
        """
        out = self._predict(x, timesteps, states)
        if self.prediction_type == "epsilon":
            return out
        signal, noise = self._levels(timesteps.expand(x.shape[0]), out)
        own = x.to(out.device).float()
        return signal * out + (own if self.prediction_type == "flow" else noise * own)

    def _predict(self, x: Tensor, timesteps: Tensor, states: TextStates) -> Tensor:
        """The model's own prediction, ``ε``, ``v`` or the velocity, fp32."""
        timesteps = timesteps.to(self.device).expand(x.shape[0])
        x = x.to(self.device)
        states = states.to(self.device, self.dtype)
        call = self._call or self._raw_prediction
        return call(x.to(self.dtype), timesteps, states).float()

    def _raw_prediction(self, x: Tensor, timesteps: Tensor, states: TextStates) -> Tensor:
        if isinstance(self.survey, TransformerSurvey):
            return self.survey.predict(x, self._noise[timesteps.long().cpu()].to(x), states)
        pooled = states.pooled
        takes_pooled = any(getattr(self.unet, name, None) is not None for name in ("add_embedding", "label_emb"))
        if takes_pooled and pooled is None:
            raise ModelError("This model also takes a pooled text vector (as SDXL), and the text encoder gives none.")
        if self.survey.layout == "diffusers":
            extra: dict[str, Any] = {}
            if takes_pooled:
                extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": self._sizes(x)}
            out: Tensor = self.unet(x, timesteps, encoder_hidden_states=states.hidden, return_dict=False, **extra)[0]
        elif takes_pooled and pooled is not None:
            sizes = _sinusoidal(self._sizes(x).flatten(), 256).view(x.shape[0], -1)
            out = self.unet(x, timesteps=timesteps, context=states.hidden, y=torch.cat([pooled, sizes.to(pooled)], 1))
        else:
            out = self.unet(x, timesteps=timesteps, context=states.hidden)
        return out

    def _sizes(self, x: Tensor) -> Tensor:
        # SDXL's size conditioning in pixels: original size, crop offset 0, target size
        height, width = x.shape[-2] * 8, x.shape[-1] * 8
        row = torch.tensor([height, width, 0, 0, height, width], dtype=x.dtype, device=x.device)
        return row.expand(x.shape[0], -1)

    # -- images --------------------------------------------------------------------------------------------------

    def timesteps(self, steps: int, spacing: str = "leading") -> list[int]:
        """Return the time steps of a sampler, descending; a flow model has one spacing, with its shift.

        Args:
            steps: Number of sampling steps.
            spacing: ``"leading"``: multiples of ``T // steps`` plus 1, as in SD1's and SD2's own configuration
                (``steps_offset`` 1). ``"trailing"``: even strides from the last step, for schedules that reach pure
                noise.
        """
        if not 1 <= steps <= self.train_steps:
            raise RequestError(f"The number of steps must be 1 to {self.train_steps}, not {steps}.")
        if spacing not in ("leading", "trailing"):
            raise RequestError(f"The spacing '{spacing}' is not known: choose 'leading' or 'trailing'.")
        if self.prediction_type == "flow":
            sigmas = (shifted(1 - i / steps, self.shift) for i in range(steps))
            return [max(round(self.train_steps * sigma), 1) - 1 for sigma in sigmas]
        if spacing == "leading":
            stride = self.train_steps // steps
            return [min(i * stride + 1, self.train_steps - 1) for i in reversed(range(steps))]
        return [round(self.train_steps * (1 - i / steps)) - 1 for i in range(steps)]

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """Return fp32 noise ``(n, 4, h, w)``, one seed per row; drawn on the CPU, so equal on every device."""
        return self._noise_from([torch.Generator("cpu").manual_seed(seed) for seed in seeds])

    def _noise_from(self, generators: Sequence[torch.Generator]) -> Tensor:
        """The next noise of each of these CPU generators, ``(n, 4, h, w)``."""
        return torch.stack([torch.randn(self.latent_shape, generator=one) for one in generators])

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int = 30,
        guidance: float = 7.5,
        negative: str | Sequence[str] = "",
        until: int | None = None,
        progress: Progress | None = None,
        batch: int = 16,
        spacing: str | None = None,
        sampler: str = "ddim",
        safety: SafetyGuidance | None = None,
        encoded: EncodedPrompts | None = None,
        start: Start | None = None,
        noise: ExtraNoise | None = None,
    ) -> Tensor:
        """Sample latents with classifier-free guidance.

        Args:
            prompts: One prompt per image.
            seeds: One seed per prompt; an image depends on its prompt and seed alone.
            steps: Number of sampling steps.
            guidance: Guidance scale; at 1 the unconditional pass is skipped.
            negative: One negative prompt for all images, or one for each.
            until: Stop after this many steps; the latents are then at time ``timesteps(steps)[until]``.
            progress: Progress callback.
            batch: Images per batch.
            spacing: As in :meth:`timesteps` (default: the model's own). The last step goes to ``α̅_0`` ("leading", as
                SD1) or to 1 ("trailing").
            sampler: ``"ddim"`` (η = 0) or ``"dpm++"`` (DPM-Solver++(2M)), which needs about half as many steps.
            safety: Steer away from a concept (:class:`SafetyGuidance`), at the cost of a third pass per step.
            encoded: Text states of all prompts (default: they are encoded here).
            start: Latents to start from (default: noise).
            noise: Noise that is added after each step but the last; for ``"ddim"``, and not for a flow model.

        Returns:
            fp32 latents ``(n, 4, h, w)``.

        Raises:
            ModelError: If the result is not finite because a weight is not.
            ForgetConceptError: If the result is not finite for another reason.
            RequestError: If the numbers of prompts, seeds and negative prompts differ, or an argument is out of range.

        Reference:
            DDIM: Song et al. 2021 (arXiv 2010.02502), eq. 12. DPM-Solver++(2M): Lu et al. 2022 (arXiv 2211.01095),
            algorithm 2.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = list(seeds)
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(seeds) != len(prompts) or len(negatives) != len(prompts):
            raise RequestError(
                f"There are {len(prompts)} prompts, {len(seeds)} seeds and {len(negatives)} negative prompts: "
                "give one seed (and one negative prompt) for each prompt."
            )
        if not math.isfinite(guidance):
            raise RequestError(f"The guidance must be a finite number, not {guidance}.")
        if batch < 1:
            raise RequestError(f"The batch must be at least 1, not {batch}.")
        spacing = self.spacing if spacing is None else spacing
        times = self.timesteps(steps, spacing)
        stop = steps if until is None else until
        if not 0 <= stop <= steps:
            raise RequestError(f"'until' must be 0 to {steps} steps, not {stop}.")
        first = 0 if start is None else start.first
        if not 0 <= first <= stop:
            raise RequestError(f"'first' must be 0 to {stop} steps, not {first}.")
        if start is not None and start.latents.shape != (len(prompts), *self.latent_shape):
            raise RequestError(
                f"The images to continue have latents of the shape {tuple(start.latents.shape)}: give one of "
                f"{tuple(self.latent_shape)} for each prompt."
            )
        if noise is not None and (sampler != "ddim" or self.prediction_type == "flow"):
            raise RequestError("Noise can be added to the steps of the sampler 'ddim' only, and not of a flow model's.")
        if not prompts:
            return torch.empty(0, *self.latent_shape, device=self.device)
        if sampler not in SAMPLERS:
            raise RequestError(f"The sampler '{sampler}' is not known: choose one of {', '.join(SAMPLERS)}.")
        guided = guidance != 1.0 or safety is not None
        path = self.noise_levels(times, steps, spacing, _LEAST_ALPHA if sampler == "dpm++" else 0.0)
        chunks = [range(i, min(i + batch, len(prompts))) for i in range(0, len(prompts), batch)]
        total, done = len(chunks) * (stop - first), 0
        if encoded is None:
            every = prompts + (negatives if guided else []) + ([safety.concept] if safety else [])

            def encoding(event: ProgressEvent) -> None:
                # the bar counts sampling steps
                report_progress(progress, ProgressEvent(0, total, message=event.message))

            encoded = EncodedPrompts(self.text, every, progress=encoding)
        latents = []
        for chunk in chunks:
            draws = [torch.Generator("cpu").manual_seed(seeds[i]) for i in chunk]
            pure = x = self._noise_from(draws).to(self.device)
            own = None if start is None else start.rows(chunk.start, chunk.stop)
            if own is not None:
                clean = own.latents.to(x)
                x = path[first][0] * clean + path[first][1] * pure if own.noised else clean
            read = [prompts[i] for i in chunk]
            if guided:
                read += [negatives[i] for i in chunk]
            if safety is not None:
                read += [safety.concept] * len(chunk)
            context = encoded.states(read)
            momentum = torch.zeros_like(x)  # of the safety guidance
            earlier: Tensor | None = None  # the x_0 prediction of the previous step
            for k in range(first, stop):
                (signal, level), after = path[k], path[k + 1]
                if self.prediction_type != "epsilon" and signal**2 < _NOISY:
                    # nearly pure noise: x_0 follows from the prediction alone, and a safety term in ε would be zero
                    v = self._guided(x, times[k], context, guidance if guided else None, self._predict)
                    x0 = (x if self.prediction_type == "flow" else signal * x) - level * v
                else:
                    if safety is None:
                        eps = self._guided(x, times[k], context, guidance if guided else None)
                    else:
                        used = k >= safety.settings.first_step(steps)
                        eps, momentum = self._safely_guided(x, times[k], context, guidance, safety, momentum, used)
                    x0 = (x - level * eps) / signal
                ahead = x0
                # the first and the last step are of first order: the extrapolation is unreliable at the end
                if sampler == "dpm++" and earlier is not None and k < steps - 1:
                    width = _log_snr(*after) - _log_snr(signal, level)
                    before = _log_snr(signal, level) - _log_snr(*path[k - 1])
                    ahead = x0 + (x0 - earlier) * (width / (2 * before))
                earlier = x0
                # with x_0 instead of the extrapolation this is DDIM's step
                share = after[1] / level
                if noise is not None and k < stop - 1:
                    fresh = noise.deviation((signal, level), after)
                    share = (after[1] ** 2 - fresh**2) ** 0.5 / level
                x = share * x + (after[0] - share * signal) * ahead
                if noise is not None and k < stop - 1:
                    x = x + fresh * noise.variance**0.5 * self._noise_from(draws).to(x)
                if own is not None and own.mask is not None:
                    x = torch.where(own.mask.to(x) > 0, x, after[0] * clean + after[1] * pure)
                done += 1
                report_progress(progress, ProgressEvent(done, total, message=f"sampling {len(prompts)} images"))
            if not bool(torch.isfinite(x).all()):
                check_weights(self)
                raise ForgetConceptError(
                    f"The pictures of '{prompts[chunk[0]]}' came out NaN or infinite: lower the strength of the "
                    "patches or the guidance, or use a wider dtype."
                )
            latents.append(x)
        return torch.cat(latents)

    def noise_levels(self, times: Sequence[int], steps: int, spacing: str, least: float) -> list[tuple[float, float]]:
        """Signal and noise at every visited step and at the end; ``least`` bounds the share of signal from below."""
        if self.prediction_type == "flow":
            # the second-order sampler needs a finite signal-to-noise ratio
            levels = [(max(float(self._signal[t]), least), float(self._noise[t])) for t in times]
            return [*levels, (1.0, 0.0)]
        path = [max(float(self.alphas_cumprod[t]), least) for t in times]
        if spacing == "leading":
            last = times[-1] - self.train_steps // steps
            path.append(float(self.alphas_cumprod[max(last, 0)]))
        else:
            path.append(1.0)
        return [(alpha**0.5, (1 - alpha) ** 0.5) for alpha in path]

    def _guided(
        self,
        x: Tensor,
        time: int,
        context: TextStates,
        guidance: float | None,
        predict: Callable[[Tensor, Tensor, TextStates], Tensor] | None = None,
    ) -> Tensor:
        """The guided prediction; the states after the first two parts (a safety concept's) are not read."""
        predict, count = predict or self.predict_noise, x.shape[0]
        if guidance is None:
            return predict(x, torch.full((count,), time), context)
        if len(context) > 2 * count:
            context = context.index(range(2 * count))
        # both passes in one batch: on a small model on a CPU this costs little more than one
        both = predict(torch.cat([x, x]), torch.full((2 * count,), time), context)
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def _safely_guided(
        self,
        x: Tensor,
        time: int,
        context: TextStates,
        guidance: float,
        safety: SafetyGuidance,
        momentum: Tensor,
        used: bool,
    ) -> tuple[Tensor, Tensor]:
        """The guided prediction and the next momentum."""
        every = self.predict_noise(torch.cat([x, x, x]), torch.full((3 * x.shape[0],), time), context)
        conditional, unconditional, unsafe = every.chunk(3)
        term, momentum = safety_term(conditional, unconditional, unsafe, safety.settings, momentum)
        direction = conditional - unconditional
        return unconditional + guidance * (direction - term if used else direction), momentum

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 16) -> Tensor:
        """Decode to images ``(n, 3, H, W)`` in [-1, 1].

        Raises:
            ModelError: If the model has no autoencoder, or a damaged one.
            ForgetConceptError: If the images are not finite for another reason.
        """
        if self.vae is None:
            raise ModelError(
                f"The model '{self.name}' has no autoencoder here, so latents cannot be decoded to images."
            )
        if not len(latents):
            raise RequestError("There are no latents to decode.")
        vae = self.vae
        images = torch.cat([vae.decode(latents[i : i + batch]) for i in range(0, len(latents), batch)])
        if not bool(torch.isfinite(images).all()):
            check_weights(self)
            raise ForgetConceptError(
                "The autoencoder gives NaN or infinite values: it overflows in its dtype (SDXL's does in float16), or "
                "the latents are far out of range. Use a wider dtype, or lower the strength of the patches."
            )
        return images


def _sinusoidal(values: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding ``(n, width)`` of ``values`` ``(n,)``, cosines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=values.device) / half)
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)
