"""The result of every method: low-rank factors per layer against the base weights, frozen and composable.

A :class:`Patch` is applied by forward hooks, not by changing weights, so removing it restores the model bit-exactly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import PatchError, listed
from ..models.latent_diffusion import LatentDiffusion
from ..models.model_survey import ModelSurvey
from ..models.survey import survey
from ..request.request import check_patch_strength
from .apply import PatchHandle, _Delta
from .low_rank import LowRank
from .metadata import CombinedPart, PatchMetadata
from .outlets import attacher, saver

__all__ = ["Patch", "Pipeline", "survey_of"]

ADAPTER = "forget-concept"


class Pipeline(Protocol):
    """A diffusers pipeline, as far as a patch needs one."""

    @property
    def unet(self) -> Any: ...


def survey_of(unet: nn.Module | ModelSurvey) -> ModelSurvey:
    """The survey of a UNet; a survey is returned as it is."""
    return unet if isinstance(unet, ModelSurvey) else survey(unet)


@dataclass(frozen=True)
class Patch:
    """An edit of a model; it changes nothing until it is applied or merged.

    Args:
        factors: Weight changes by canonical key of the layer, such as ``<site>.to_k``; at least one.
        metadata: Metadata as a file holds it; :attr:`about` is the typed view.
        context_maps: ``M`` in ``ΔW = W M`` by stream of text states, where a closed form has them: the whole edit as
            linear maps of the text states, valid for every checkpoint with the same text encoders.

    Raises:
        PatchError: There are no factors.
    """

    factors: Mapping[str, LowRank]
    metadata: Mapping[str, str] = field(default_factory=dict)
    context_maps: Mapping[str, LowRank] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.factors:
            raise PatchError("This patch is empty: it changes no layer at all.")
        object.__setattr__(self, "factors", dict(self.factors))
        object.__setattr__(self, "metadata", dict(self.metadata))
        object.__setattr__(self, "context_maps", dict(self.context_maps))

    def __len__(self) -> int:
        return len(self.factors)

    @property
    def rank(self) -> int:
        """The highest rank of the factors."""
        return max(factor.rank for factor in self.factors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all factors, without the context maps."""
        return sum(factor.nbytes for factor in self.factors.values())

    @cached_property
    def about(self) -> PatchMetadata:
        """The metadata, typed."""
        return PatchMetadata.from_strings(self.metadata)

    def with_metadata(self, **fields: Any) -> Patch:
        """The same patch with fields of :class:`PatchMetadata` added or replaced; other entries stay unchanged."""
        return replace(self, metadata={**self.metadata, **PatchMetadata(**fields).to_strings()})

    def _each(self, change: Any) -> Patch:
        maps = {stream: change(one) for stream, one in self.context_maps.items()}
        return replace(self, factors={k: change(f) for k, f in self.factors.items()}, context_maps=maps)

    def scaled(self, strength: float) -> Patch:
        """The edit multiplied by ``strength``; negative values reverse it.

        Raises:
            PatchError: ``strength`` is not from -10 to 10.
        """
        check_patch_strength(strength)
        return self._each(lambda factor: factor.scaled(strength))

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Patch:
        """The same patch in another dtype or on another device."""
        return self._each(lambda factor: factor.to(device, dtype))

    def truncated(self, rank: int | None = None, energy: float = 1.0) -> Patch:
        """Every factor truncated by :meth:`LowRank.truncated`.

        The context maps describe the edit before truncation, so they are dropped unless ``rank`` and ``energy`` have
        their defaults.
        """
        cut = {key: factor.truncated(rank, energy) for key, factor in self.factors.items()}
        return replace(self, factors=cut, context_maps=self.context_maps if rank is None and energy == 1 else {})

    def max_abs(self) -> float:
        """An upper bound of the largest absolute change of any weight; 0 only if the patch changes nothing."""
        return max(
            float((factor.up.float().norm(dim=1).max() * factor.down.float().norm(dim=0).max()).item())
            if factor.rank
            else 0.0
            for factor in self.factors.values()
        )

    @staticmethod
    def combined(patches: Sequence[tuple[Patch, float]]) -> Patch:
        """The exact sum of several patches, each with its strength; their factors are concatenated.

        Raises:
            PatchError: There are no patches, or they are for different model families.
        """
        if not patches:
            raise PatchError("There are no patches to combine.")
        families = {patch.about.family for patch, _ in patches if patch.about.family is not None}
        if len(families) > 1:
            raise PatchError(f"Patches of different model families cannot be combined: {', '.join(sorted(families))}.")
        scaled = [patch.scaled(strength) for patch, strength in patches]
        if len(scaled) == 1:
            return scaled[0]
        parts: dict[str, list[LowRank]] = {}
        for patch in scaled:
            for key, factor in patch.factors.items():
                parts.setdefault(key, []).append(factor)
        streams = dict.fromkeys(stream for patch in scaled for stream in patch.context_maps)
        mapped = all(patch.context_maps for patch in scaled)
        about = PatchMetadata(
            method="combined",
            family=families.pop() if families else None,
            parts=tuple(CombinedPart(strength, patch.metadata) for patch, strength in patches),
        )
        return Patch(
            {key: LowRank.cat(several) for key, several in parts.items()},
            about.to_strings(),
            {
                stream: LowRank.cat([patch.context_maps[stream] for patch in scaled if stream in patch.context_maps])
                for stream in streams
                if mapped
            },
        )

    # -- on a model ----------------------------------------------------------------------------------------------

    def check_fits(self, unet: nn.Module | ModelSurvey) -> None:
        """Check that the patch can be applied to a UNet.

        Raises:
            PatchError: A layer is missing or has another shape, or a factor is not finite.
        """
        found = survey_of(unet)
        absent = [key for key in self.factors if found.find(key) is None]
        if len(absent) == len(self.factors):
            raise PatchError(
                f"No layer of this model matches the patch: it changes {listed(absent, 2)}, and the model "
                f"(family {found.family}, {len(found)} cross-attention sites) has none of them. Load a model of the "
                "architecture that the patch was made for."
            )
        if absent:
            raise PatchError(
                f"This patch is for another architecture: {len(absent)} of its {len(self.factors)} layers are not in "
                f"this model, such as {listed(absent, 2)}."
            )
        for key, factor in self.factors.items():
            weight = found.linear(key).weight
            if factor.shape != tuple(weight.shape):
                raise PatchError(
                    f"This patch is for another architecture: at {key} it changes a {factor.shape[0]}×{factor.shape[1]}"
                    f" weight, and this model's is {weight.shape[0]}×{weight.shape[1]}."
                )
        self.check_finite()

    def check_finite(self) -> None:
        """Check the values of the factors.

        Raises:
            PatchError: A factor has NaN or infinite values.
        """
        for key, factor in self.factors.items():
            if not (torch.isfinite(factor.up).all() and torch.isfinite(factor.down).all()):
                raise PatchError(f"This patch is damaged: it holds NaN or infinite values at {key}.")

    def apply(
        self,
        model: LatentDiffusion | nn.Module | ModelSurvey | Pipeline,
        strength: float = 1.0,
        *,
        name: str | None = None,
    ) -> PatchHandle:
        """Put the patch on a model until it is removed; the weights stay untouched, and several patches add up.

        On a diffusers pipeline, or wherever a ``name`` is given, the patch is a peft adapter: ``set_adapters``,
        ``delete_adapters`` and ``get_list_adapters`` know it by its name, and adapters that are active stay active.
        Without a name, a loaded model or a raw UNet gets forward hooks, which need no peft.

        Args:
            model: a loaded model, a raw UNet (diffusers or LDM naming) or a diffusers pipeline.
            strength: factor of the edit; 0 is none, and negative values do the opposite.
            name: of the peft adapter; on a pipeline ``"forget-concept"`` by default.

        Returns:
            A handle: ``handle.remove()`` takes the patch off, and so does leaving a ``with`` block.

        Raises:
            PatchError: as :meth:`check_fits`, for a strength that is not from -10 to 10, or for a name that is taken;
                nothing is put on then.
        """
        check_patch_strength(strength)
        if isinstance(model, (LatentDiffusion, nn.Module, ModelSurvey)):
            unet: Any = model if isinstance(model, (nn.Module, ModelSurvey)) else model.survey
        else:
            unet = getattr(model, "unet", None) or getattr(model, "transformer", None)
            if not isinstance(unet, nn.Module):
                raise PatchError(
                    f"A patch cannot be applied to a {type(model).__name__}, which has no UNet or transformer: give a "
                    "loaded model, a raw one or a pipeline of diffusers."
                )
            name = ADAPTER if name is None else name
        if name is not None:
            return attacher()(self, unet.unet if isinstance(unet, ModelSurvey) else unet, name, strength)
        found = survey_of(unet)
        self.check_fits(found)
        handle = PatchHandle()
        try:
            for key, factor in self.factors.items():
                linear = found.linear(key)
                handle.add(linear.register_forward_hook(_Delta(factor, strength, linear.weight.device)))
        except BaseException:
            handle.remove()
            raise
        return handle

    @contextmanager
    def applied(self, unet: nn.Module | ModelSurvey, strength: float = 1.0) -> Iterator[None]:
        """:meth:`apply` within a ``with`` block."""
        handle = self.apply(unet, strength)
        try:
            yield
        finally:
            handle.remove()

    def save(
        self,
        path: str | os.PathLike[str],
        format: str = "kohya",
        dtype: torch.dtype = torch.float32,
        survey: ModelSurvey | None = None,
    ) -> None:
        """Write the patch, whole or not at all.

        Args:
            path: the ``.safetensors`` file, or the folder of a peft adapter.
            format: ``"kohya"`` (a LoRA file that every host loads, and diffusers too where no pooled vector is edited),
                ``"diffusers"`` (a LoRA file in diffusers' names, which ComfyUI and Forge load too), ``"peft"`` (an
                adapter folder) or ``"context-map"`` (the smallest form of a closed-form edit).
            dtype: of the values in the file.
            survey: gives the LDM names of an SDXL-shaped UNet that does not have two layers a block.

        Raises:
            PatchError: the format is not known, the patch cannot be written in it (no context map, values that do not
                fit into ``dtype``), or the place cannot be written.
        """
        saver(format)(self, path, survey=survey, dtype=dtype)

    def merged_state(self, unet: nn.Module | ModelSurvey, strength: float = 1.0) -> dict[str, Tensor]:
        """The edited weights as new tensors; the UNet is not changed.

        A narrow dtype rounds part of the edit away: see :meth:`surviving_share`.

        Returns:
            New weights in their own dtype, by their name in ``unet.state_dict()``.

        Raises:
            PatchError: As :meth:`check_fits`.
        """
        check_patch_strength(strength)
        found = survey_of(unet)
        self.check_fits(found)
        state = {}
        for key, factor in self.factors.items():
            layer = found.layer(key)
            weight = layer.module.weight.detach()
            wide = weight.double() + strength * factor.to(weight.device, torch.float64).delta()
            state[layer.path + ".weight"] = wide.to(weight.dtype)
        return state

    def surviving_share(self, unet: nn.Module | ModelSurvey, dtype: torch.dtype | None = None) -> float:
        """Share of the edit that is left after merging into weights of ``dtype``: ``⟨Δ', Δ⟩ / ‖Δ‖²``, about 0 to 1.

        An edit much smaller than the spacing of the dtype is rounded away: Forget-Me-Not changes weights by about 7e-5,
        and bf16 values near 0.02 are 1.2e-4 apart.

        Args:
            unet: The UNet, or its survey.
            dtype: Dtype of the merged weights; default: their own.

        Raises:
            PatchError: As :meth:`check_fits`, or the patch changes nothing.
        """
        found = survey_of(unet)
        self.check_fits(found)
        kept = total = 0.0
        for key, factor in self.factors.items():
            weight = found.linear(key).weight.detach()
            target = dtype or weight.dtype
            base = weight.to(target).double()
            delta = factor.to(weight.device, torch.float64).delta()
            after = (base + delta).to(target).double()
            kept += float(((after - base) * delta).sum())
            total += float((delta**2).sum())
        if total == 0:
            raise PatchError("This patch changes nothing: all of its factors are zero.")
        return kept / total
