"""A low-rank change of one weight matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PatchError

__all__ = ["LowRank"]


@dataclass(frozen=True)
class LowRank:
    """A weight change ``Δ = up @ down`` of rank ``r``.

    Args:
        up: Left factor, ``(d_out, r)``.
        down: Right factor, ``(r, d_in)``.

    Raises:
        PatchError: The shapes do not match.
    """

    up: Tensor
    down: Tensor

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise PatchError(
                f"The factors of a patch do not fit together: up is {tuple(self.up.shape)}, "
                f"down is {tuple(self.down.shape)}."
            )

    @property
    def rank(self) -> int:
        """Number of directions, ``r``; the numerical rank may be lower."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that it changes: ``(d_out, d_in)``."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return sum(t.numel() * t.element_size() for t in (self.up, self.down))

    def delta(self) -> Tensor:
        """The full change ``up @ down``, ``(d_out, d_in)``, in fp32, or in fp64 if a factor is."""
        up, down = (t if t.dtype == torch.float64 else t.float() for t in (self.up, self.down))
        return up @ down

    def scaled(self, strength: float) -> LowRank:
        """``strength · Δ``."""
        return LowRank(self.up * strength, self.down)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LowRank:
        """The same change on another device or in another dtype."""
        return LowRank(self.up.to(device=device, dtype=dtype), self.down.to(device=device, dtype=dtype))

    def truncated(self, rank: int | None = None, energy: float = 1.0) -> LowRank:
        """The nearest change in Frobenius norm of bounded rank; the defaults reduce the rank to the numerical one.

        The two factors of each direction get equal norms, which loses least in half precision.

        Args:
            rank: Highest rank, at least 1; ``None``: no bound.
            energy: Share of ``‖Δ‖²`` to keep, above 0 and at most 1; the lowest rank with that share is used.

        Raises:
            PatchError: ``rank`` or ``energy`` is out of range.
        """
        if rank is not None and rank < 1:
            raise PatchError(f"A patch cannot be truncated to rank {rank}: the rank must be at least 1.")
        if not 0 < energy <= 1:
            raise PatchError(
                f"A patch cannot be truncated to {energy} of its energy: the share must be above 0 and at most 1."
            )
        # SVD of the thin factors: the (d_out, d_in) product is never computed
        left, upper = torch.linalg.qr(self.up.double())
        right, lower = torch.linalg.qr(self.down.double().T)
        u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        keep = int((s > s[0] * 1e-7).sum()) if s.numel() and s[0] > 0 else 1
        if energy < 1 and s.numel() and s[0] > 0:
            share = torch.cumsum(s**2, 0) / (s**2).sum()
            keep = min(keep, int((share < energy).sum()) + 1)
        keep = min(keep, rank or keep, max(s.numel(), 1))
        root = s[:keep].sqrt()
        up, down = (left @ u[:, :keep]) * root, (right @ vh[:keep].T * root).T
        return LowRank(up.to(self.up.dtype).contiguous(), down.to(self.down.dtype).contiguous())

    @staticmethod
    def cat(parts: Sequence[LowRank]) -> LowRank:
        """The exact sum of several changes; its rank is the sum of theirs.

        Raises:
            PatchError: They change weights of different shapes.
        """
        if len({part.shape for part in parts}) > 1:
            raise PatchError(f"Patches of different shapes cannot be added: {sorted({p.shape for p in parts})}.")
        device = parts[0].up.device
        dtype = parts[0].up.dtype
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.up.dtype)
        moved = [part.to(device, dtype) for part in parts]
        return LowRank(torch.cat([p.up for p in moved], 1), torch.cat([p.down for p in moved], 0))
