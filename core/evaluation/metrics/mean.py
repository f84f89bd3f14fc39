"""A mean with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ...errors import RequestError

__all__ = ["Mean"]


@dataclass(frozen=True)
class Mean:
    """The mean ``value`` of ``n`` numbers and its standard error; ``None`` where there is only one."""

    value: float
    error: float | None
    n: int

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        """Of ``(n,)``. Raises :class:`RequestError` for none, and for values that are not finite."""
        values = values.detach().double().flatten().cpu()
        if not len(values):
            raise RequestError("There is nothing to take a mean of: give at least one picture.")
        if not bool(values.isfinite().all()):
            raise RequestError("Some of the pictures' values are not finite numbers, so they have no mean.")
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(float(values.mean()), error, len(values))

    def as_dict(self) -> dict[str, float | int | None]:
        return {"value": self.value, "error": self.error, "n": self.n}
