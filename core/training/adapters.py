"""Trainable changes of projections, attached by forward hooks."""

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
Shown = Literal["base", "earlier", "now"]


class Trainable(Protocol):
    """What the loop moves: parameters, and what has to be on the model while it does (:class:`Deltas`)."""

    def parameters(self) -> list[nn.Parameter]: ...

    def attached(self) -> AbstractContextManager[object]: ...


class Deltas:
    """Trainable changes of some projections, attached by forward hooks: ``up @ down`` each, or one dense matrix each.

    ``keys`` are canonical (``<site>.to_k``). With a ``rank``, ``down`` starts at random (drawn on the CPU from
    ``generator``, uniform within ``1/√d_in``) and ``up`` at zero; with ``rank=None`` the dense delta starts at zero:
    either way nothing is changed yet. Parameters are fp32 on the layer's device.

    ``earlier`` is what earlier requests left: it is added as well, and stays as it is. ``null_space`` gives, for some
    keys, orthonormal columns ``(d_in, n)``: directions of the input that the trained change must not react to.
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
        self.shown: Shown = "now"
        self._parts: dict[str, tuple[nn.Parameter, ...]] = {}
        self._hooks: list[RemovableHandle] = []
        if not self.keys:
            raise ModelError("There is nothing to train: no projection was chosen.")
        if earlier is not None:
            earlier.check_fits(model.survey)
        frozen = {} if earlier is None else earlier.factors
        self._linears = {key: model.survey.linear(key) for key in dict.fromkeys([*self.keys, *frozen])}
        device = {key: linear.weight.device for key, linear in self._linears.items()}
        self._earlier = {key: factor.to(device[key], torch.float32) for key, factor in frozen.items()}
        self._blind = {key: basis.to(device[key], torch.float32) for key, basis in (null_space or {}).items()}
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
        """The hooks are on inside a ``with`` block and off after it, whatever happens."""
        try:
            for key, linear in self._linears.items():
                self._hooks.append(linear.register_forward_hook(self._hook(key)))
            yield self
        finally:
            while self._hooks:
                self._hooks.pop().remove()

    @contextmanager
    def showing(self, which: Shown) -> Iterator[None]:
        """Inside a ``with`` block: the ``"base"`` model, what ``"earlier"`` requests left of it, or ``"now"``."""
        before, self.shown = self.shown, which
        try:
            yield
        finally:
            self.shown = before

    def _hook(self, key: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        parts, earlier, null_space = self._parts.get(key), self._earlier.get(key), self._blind.get(key)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self.shown == "base":
                return None
            x = args[0].float()
            if earlier is not None:
                output = output + F.linear(F.linear(x, earlier.down), earlier.up).to(output.dtype)
            if parts is None or self.shown == "earlier":
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
        """The trained change of one projection as losses take it, differentiable in its parameters.

        ``(up, down)``, or one dense ``(d_out, d_in)``.
        """
        parts, null_space = self._parts[key], self._blind.get(key)
        seeing = parts[-1] if null_space is None else null_space_projection(parts[-1], null_space)
        return seeing if len(parts) == 1 else (parts[0], seeing)

    def changes(self) -> dict[str, Change]:
        """Every projection's :meth:`change` by key."""
        return {key: self.change(key) for key in self.keys}

    def delta(self, key: str) -> Tensor:
        """The trained change of one projection, ``(d_out, d_in)``, differentiable in its parameters."""
        return dense_change(self.change(key), key)

    def factors(self, max_rank: int | None = None) -> dict[str, LowRank]:
        """The trained changes as they are, on the CPU: a LoRA's own factors, a dense delta's exact ones (full rank).

        With ``max_rank`` those above it are cut to the nearest change of that rank.
        """
        found = {}
        for key, parts in self._parts.items():
            seeing, null_space = parts[-1].detach(), self._blind.get(key)
            if null_space is not None:
                seeing = null_space_projection(seeing, null_space)
            seeing = seeing.cpu()
            factor = LowRank(parts[0].detach().cpu().clone(), seeing.clone()) if len(parts) == 2 else _exact(seeing)
            found[key] = factor if max_rank is None or factor.rank <= max_rank else factor.truncated(max_rank)
        return found


def _exact(delta: Tensor) -> LowRank:
    """A dense change times the identity on its shorter side.

    An optimiser that treats each weight alike leaves full rank, so that an SVD would take minutes on a real model to
    find no shorter form. Evenly scaled, for half precision's sake.
    """
    root = float(delta.abs().max()) ** 0.5 or 1.0
    d_out, d_in = delta.shape
    if d_out < d_in:
        return LowRank(torch.eye(d_out) * root, delta / root)
    return LowRank(delta / root, torch.eye(d_in) * root)
