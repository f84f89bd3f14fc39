"""A mean with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ...errors import RequestError

__all__ = ["Mean"]


@dataclass(frozen=True)
class Mean:
    """The mean ``value`` of ``n`` numbers and its standard ``error``, which is ``None`` for a single number."""

    value: float
    error: float | None
    n: int

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        """Compute the mean of ``values`` ``(n,)`` in fp64.

        Raises:
            RequestError: If there are no values, or a value is not finite.
        """
        values = values.detach().double().flatten().cpu()
        if not len(values):
            raise RequestError("There are no values to average: give at least one image.")
        if not bool(values.isfinite().all()):
            raise RequestError("Some of the images' values are not finite, so they have no mean: check the images.")
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(float(values.mean()), error, len(values))

    def as_dict(self) -> dict[str, float | int | None]:
        return {"value": self.value, "error": self.error, "n": self.n}
