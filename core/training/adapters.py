"""Trainable weight deltas, attached to projections by forward hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..errors import ModelError
from ..models.latent_diffusion import LatentDiffusion
from ..patch.low_rank import LowRank
from ..patch.patch import Patch
from .gradients import null_space_projection
from .losses import Change, dense_change

__all__ = ["Deltas", "Trainable"]
Variant = Literal["base", "earlier", "now"]


class Trainable(Protocol):
    """What the training loop optimizes: parameters, and a context manager that attaches them (:class:`Deltas`)."""

    def parameters(self) -> list[nn.Parameter]: ...

    def attached(self) -> AbstractContextManager[object]: ...


class Deltas:
    """Trainable deltas of some projections: ``up @ down`` or one dense matrix each.

    The model is unchanged at initialization: ``down`` is uniform within ``±1/√d_in``, ``up`` and a dense delta are
    zero. Parameters are fp32 on the layer's device.

    Args:
        model: The base model.
        keys: Canonical keys of the projections, such as ``<site>.to_k``.
        rank: Rank of the factors; ``None``: dense deltas.
        generator: Source of the initial ``down``, on the CPU.
        earlier: Patch of earlier requests, which is applied as well and not trained.
        null_space: By key the orthonormal columns ``(d_in, n)`` of input directions that the delta must not react to.

    Raises:
        ModelError: There is no key, or a projection does not exist.
        PatchError: ``earlier`` does not fit the model.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        keys: Sequence[str],
        rank: int | None,
        generator: torch.Generator,
        earlier: Patch | None = None,
        null_space: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.rank = rank
        self.keys = tuple(keys)
        self.variant: Variant = "now"
        self._parts: dict[str, tuple[nn.Parameter, ...]] = {}
        self._hooks: list[RemovableHandle] = []
        if not self.keys:
            raise ModelError("There is nothing to train: choose at least one projection.")
        if earlier is not None:
            earlier.check_fits(model.survey)
        frozen = {} if earlier is None else earlier.factors
        self._linears = {key: model.survey.linear(key) for key in dict.fromkeys([*self.keys, *frozen])}
        device = {key: linear.weight.device for key, linear in self._linears.items()}
        self._earlier = {key: factor.to(device[key], torch.float32) for key, factor in frozen.items()}
        self._null_space = {key: basis.to(device[key], torch.float32) for key, basis in (null_space or {}).items()}
        for key in self.keys:
            d_out, d_in = self._linears[key].weight.shape
            if rank is None:
                self._parts[key] = (nn.Parameter(torch.zeros(d_out, d_in, device=device[key])),)
                continue
            r = min(rank, d_out, d_in)
            down = (torch.rand(r, d_in, generator=generator) * 2 - 1) / math.sqrt(d_in)
            self._parts[key] = (
                nn.Parameter(torch.zeros(d_out, r, device=device[key])),
                nn.Parameter(down.to(device[key])),
            )

    @contextmanager
    def attached(self) -> Iterator[Deltas]:
        """Attach the deltas inside a ``with`` block; the hooks are removed however it ends."""
        try:
            for key, linear in self._linears.items():
                self._hooks.append(linear.register_forward_hook(self._hook(key)))
            yield self
        finally:
            while self._hooks:
                self._hooks.pop().remove()

    @contextmanager
    def using(self, variant: Variant) -> Iterator[None]:
        """Select what the hooks add inside a ``with`` block.

        Args:
            variant: ``"base"``: nothing. ``"earlier"``: the patch of earlier requests. ``"now"``: that and the deltas.
        """
        before, self.variant = self.variant, variant
        try:
            yield
        finally:
            self.variant = before

    def _hook(self, key: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        parts, earlier, null_space = self._parts.get(key), self._earlier.get(key), self._null_space.get(key)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self.variant == "base":
                return None
            x = args[0].float()
            if earlier is not None:
                output = output + F.linear(F.linear(x, earlier.down), earlier.up).to(output.dtype)
            if parts is None or self.variant == "earlier":
                return output
            if null_space is not None:
                x = null_space_projection(x, null_space)
            for part in reversed(parts):
                x = F.linear(x, part)
            return output + x.to(output.dtype)

        return hook

    def parameters(self) -> list[nn.Parameter]:
        return [part for parts in self._parts.values() for part in parts]

    def change(self, key: str) -> Change:
        """The delta of one projection as losses take it, differentiable in its parameters.

        Returns:
            ``(up, down)``, or one dense ``(d_out, d_in)``.
        """
        parts, null_space = self._parts[key], self._null_space.get(key)
        last = parts[-1] if null_space is None else null_space_projection(parts[-1], null_space)
        return last if len(parts) == 1 else (parts[0], last)

    def changes(self) -> dict[str, Change]:
        """Every projection's :meth:`change`, by key."""
        return {key: self.change(key) for key in self.keys}

    def delta(self, key: str) -> Tensor:
        """The dense delta of one projection, ``(d_out, d_in)``, differentiable in its parameters."""
        return dense_change(self.change(key), key)

    def factors(self, max_rank: int | None = None) -> dict[str, LowRank]:
        """The deltas as low-rank factors on the CPU; those of a dense delta are exact and of full rank.

        Args:
            max_rank: Truncate each delta to the nearest one of this rank; ``None``: no limit.
        """
        found = {}
        for key, parts in self._parts.items():
            last, null_space = parts[-1].detach(), self._null_space.get(key)
            if null_space is not None:
                last = null_space_projection(last, null_space)
            last = last.cpu()
            factor = LowRank(parts[0].detach().cpu().clone(), last.clone()) if len(parts) == 2 else _exact(last)
            found[key] = factor if max_rank is None or factor.rank <= max_rank else factor.truncated(max_rank)
        return found


def _exact(delta: Tensor) -> LowRank:
    """A dense delta as itself times the identity on its shorter side.

    Elementwise optimizers produce full-rank deltas, so an SVD would take minutes on a real model and shorten nothing.
    Both factors get the same scale, which suits half precision.
    """
    root = float(delta.abs().max()) ** 0.5 or 1.0
    d_out, d_in = delta.shape
    if d_out < d_in:
        return LowRank(torch.eye(d_out) * root, delta / root)
    return LowRank(delta / root, torch.eye(d_in) * root)
