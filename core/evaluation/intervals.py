"""95 % confidence intervals of proportions and of ratios of paired proportions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ForgetConceptError

__all__ = ["Z95", "Score", "paired_ratio", "wilson"]

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """A measured proportion: its ``value``, the 95 % interval (``low``, ``high``) and the number ``n`` of trials."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def share(cls, outcomes: Sequence[bool]) -> Score:
        """Return the proportion of ``True`` with Wilson's interval.

        Raises:
            ForgetConceptError: If ``outcomes`` is empty.
        """
        if not outcomes:
            raise ForgetConceptError("There are no outcomes to compute a proportion of: increase the image count.")
        hits = sum(map(bool, outcomes))
        return cls(hits / len(outcomes), *wilson(hits, len(outcomes)), len(outcomes))

    @classmethod
    def ratio(cls, after: Sequence[bool], before: Sequence[bool]) -> Score:
        """Return the accuracy of ``after`` relative to the accuracy of ``before`` on the same trials.

        Raises:
            ForgetConceptError: If ``before`` has no correct trial, so that retention is undefined.
        """
        if not any(before):
            raise ForgetConceptError(
                "The unedited model draws none of these prompts correctly, so retention cannot be measured on them: "
                "use other prompts or more images."
            )
        return cls(*paired_ratio(after, before), len(before))

    @property
    def complement(self) -> Score:
        """The score subtracted from 1: the proportion of failures, or the loss for a retention."""
        return Score(1 - self.value, 1 - self.high, 1 - self.low, self.n)

    def as_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a proportion; it lies within [0, 1] and never has zero width.

    Args:
        successes: Number of successes.
        n: Number of trials.
        z: Quantile of the normal distribution. Default: 95 % coverage.

    Returns:
        The lower and the upper bound.

    Raises:
        ValueError: If ``successes`` is not within 0 and ``n``, or ``n`` is 0.

    Reference: Wilson 1927, *Probable inference, the law of succession, and statistical inference*.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is not a proportion")
    return _wilson(successes, n, z)


def _wilson(successes: float, n: float, z: float) -> tuple[float, float]:
    share = successes / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # at the ends the exact bound is 0 or 1; rounding must not push it past the proportion itself
    low = 0.0 if successes == 0 else (middle - half) / scale
    high = 1.0 if successes == n else (middle + half) / scale
    return low, high


def paired_ratio(after: Sequence[bool], before: Sequence[bool], z: float = Z95) -> tuple[float, float, float]:
    """Ratio of two proportions measured on the same trials, with its confidence interval.

    Combines the Wilson intervals of the two proportions at a ``z`` reduced so that the quotient has the nominal
    coverage. Trials that fail in both carry no information about the ratio and are dropped.

    Args:
        after: Outcomes of the numerator.
        before: Outcomes of the denominator, paired with ``after``.
        z: Quantile of the normal distribution. Default: 95 % coverage.

    Returns:
        ``(ratio, low, high)``.

    Raises:
        ValueError: If the lengths differ or ``before`` has no success.

    Reference: Bonett and Price 2006, *Confidence intervals for a ratio of binomial proportions based on paired data*.
    """
    if len(after) != len(before):
        raise ValueError(f"{len(after)} trials cannot be paired with {len(before)}")
    both = sum(a and b for a, b in zip(after, before, strict=True))
    gained = sum(a and not b for a, b in zip(after, before, strict=True))
    lost = sum(b and not a for a, b in zip(after, before, strict=True))
    first, second, trials = both + gained, both + lost, both + gained + lost
    if second == 0:
        raise ValueError("the ratio to a proportion of 0 is undefined")

    def log_error(count: int) -> float:
        share = (count + 1) / (trials + 2)
        return math.sqrt((1 - share) / ((trials + 2) * share))

    difference = math.sqrt((gained + lost + 2) / ((first + 1) * (second + 1)))
    shrunk = z * difference / (log_error(first) + log_error(second))
    low_first, high_first = _wilson(first, trials, shrunk)
    low_second, high_second = _wilson(second, trials, shrunk)
    return first / second, low_first / high_second, high_first / low_second
