"""What a text encoder returns, and a UNet reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["TextStates"]


@dataclass(frozen=True)
class TextStates:
    """Text states of ``n`` prompts.

    Attributes:
        hidden: Hidden states ``(n, tokens, d)``.
        pooled: Pooled vectors ``(n, d_pooled)`` for models that read one (SDXL), else ``None``.
        lengths: How many states each prompt has, ``(n,)`` on the CPU; behind them ``hidden`` is zero. ``None``: all.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    lengths: Tensor | None = None

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
        return TextStates(self.hidden.to(device=device, dtype=dtype, copy=copy), pooled, self.lengths)

    def index(self, rows: Sequence[int]) -> TextStates:
        """Return the given rows in the given order; rows may repeat."""
        chosen = torch.as_tensor(list(rows), dtype=torch.long, device=self.hidden.device)
        pooled = None if self.pooled is None else self.pooled[chosen]
        lengths = None if self.lengths is None else self.lengths[chosen.cpu()]
        return TextStates(self.hidden[chosen], pooled, lengths)

    def known(self) -> list[int]:
        """How many states each prompt has."""
        return [self.hidden.shape[1]] * len(self) if self.lengths is None else [int(n) for n in self.lengths]

    def mean(self) -> Tensor:
        """The mean of each prompt's states, ``(n, d)`` fp32."""
        count = torch.tensor(self.known(), device=self.hidden.device)
        return self.hidden.float().sum(1) / count[:, None]

    @staticmethod
    def cat(states: Sequence[TextStates]) -> TextStates:
        """Concatenate states along the first axis; prompts with fewer states than others are padded with zeros."""
        longest = max(part.hidden.shape[1] for part in states)
        hidden = [pad(part.hidden, (0, 0, 0, longest - part.hidden.shape[1])) for part in states]
        pooled = [part.pooled for part in states if part.pooled is not None]
        known = [length for part in states for length in part.known()]
        lengths = None if set(known) <= {longest} else torch.tensor(known)
        return TextStates(torch.cat(hidden), torch.cat(pooled) if pooled else None, lengths)
