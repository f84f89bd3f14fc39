"""What a text encoder returns, and a UNet reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TextStates"]


@dataclass(frozen=True)
class TextStates:
    """Text states of ``n`` prompts.

    Attributes:
        hidden: Hidden states ``(n, tokens, d)``.
        pooled: Pooled vectors ``(n, d_pooled)`` for models that read one (SDXL), else ``None``.
    """

    hidden: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self.hidden.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, copy: bool = False
    ) -> TextStates:
        """Return the states on another device or in another dtype (``None``: unchanged)."""
        pooled = None if self.pooled is None else self.pooled.to(device=device, dtype=dtype, copy=copy)
        return TextStates(self.hidden.to(device=device, dtype=dtype, copy=copy), pooled)

    def index(self, rows: Sequence[int]) -> TextStates:
        """Return the given rows in the given order; rows may repeat."""
        chosen = torch.as_tensor(list(rows), dtype=torch.long, device=self.hidden.device)
        return TextStates(self.hidden[chosen], None if self.pooled is None else self.pooled[chosen])

    @staticmethod
    def cat(states: Sequence[TextStates]) -> TextStates:
        """Concatenate states along the first axis."""
        pooled = [s.pooled for s in states if s.pooled is not None]
        return TextStates(torch.cat([s.hidden for s in states]), torch.cat(pooled) if pooled else None)
