"""Where a text enters a model: the linear layers that read it first.

Everything behind such a layer sees the text through it alone. A linear map of the text states is therefore stored
exactly in these layers, ``ΔW = W M``, whatever stands behind them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

__all__ = ["MEAN", "POOLED", "TOKENS", "TextEntry"]

# streams: a vector for each token, one for the whole prompt, and the mean of the tokens' vectors
TOKENS, POOLED, MEAN = "tokens", "pooled", "mean"


@dataclass(frozen=True)
class TextEntry:
    """A linear layer that reads one stream of text states.

    Attributes:
        key: Canonical key of the layer.
        stream: The stream, such as :data:`TOKENS`.
        module: The layer.
        width: Width of the stream's states.
        start: Index of the layer's input at which they begin; the layer may read other things beside them.
        norm: What the states go through before the layer, if it is not the states themselves that it reads.
    """

    key: str
    stream: str
    module: nn.Linear = field(repr=False, compare=False)
    width: int
    start: int = 0
    norm: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def weight(self) -> Tensor:
        """The columns of the layer's weight that read the text, ``(d_out, width)``, detached."""
        return self.module.weight.detach()[:, self.start : self.start + self.width]
