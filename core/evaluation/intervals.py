"""95 % intervals of shares and of ratios of paired shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ForgetConceptError

__all__ = ["Z95", "Score", "paired_ratio", "wilson"]

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """A measured fraction: its ``value``, a 95 % interval and the number ``n`` of trials behind it."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def share(cls, outcomes: Sequence[bool]) -> Score:
        """The share of ``True``, with Wilson's interval. Raises :class:`ForgetConceptError` where there is no trial."""
        if not outcomes:
            raise ForgetConceptError("There is nothing to take a share of: ask for more pictures.")
        hits = sum(map(bool, outcomes))
        return cls(hits / len(outcomes), *wilson(hits, len(outcomes)), len(outcomes))

    @classmethod
    def ratio(cls, after: Sequence[bool], before: Sequence[bool]) -> Score:
        """How often ``after`` is right, as a share of how often ``before`` is, trial by trial the same question.

        Raises :class:`ForgetConceptError` where ``before`` is never right: nothing can then be said of what is kept.
        """
        if not any(before):
            raise ForgetConceptError(
                "The unedited model draws none of these prompts right, so what is kept of them cannot be measured."
            )
        return cls(*paired_ratio(after, before), len(before))

    @property
    def complement(self) -> Score:
        """Of what is left of 1: the share of misses, or what is lost of what was kept."""
        return Score(1 - self.value, 1 - self.high, 1 - self.low, self.n)

    def as_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), within [0, 1] and of positive width also at 0 and at ``n``."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is no share")
    return _wilson(successes, n, z)


def _wilson(successes: float, n: float, z: float) -> tuple[float, float]:
    share = successes / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # at the ends the exact bound is 0 or 1; rounding must not push it past the share itself
    low = 0.0 if successes == 0 else (middle - half) / scale
    high = 1.0 if successes == n else (middle + half) / scale
    return low, high


def paired_ratio(after: Sequence[bool], before: Sequence[bool], z: float = Z95) -> tuple[float, float, float]:
    """Ratio of two shares measured on the same trials, and its interval: ``(ratio, low, high)``.

    Bonett and Price 2006, *Confidence intervals for a ratio of binomial proportions based on paired data*: Wilson's
    interval of each share, at a ``z`` shrunk so that their quotient has the coverage of one. Trials that neither gets
    right say nothing about the ratio and drop out.
    """
    if len(after) != len(before):
        raise ValueError(f"{len(after)} trials cannot be paired with {len(before)}")
    both = sum(a and b for a, b in zip(after, before, strict=True))
    gained = sum(a and not b for a, b in zip(after, before, strict=True))
    lost = sum(b and not a for a, b in zip(after, before, strict=True))
    first, second, trials = both + gained, both + lost, both + gained + lost
    if second == 0:
        raise ValueError("the ratio to a share of 0 is not defined")

    def log_error(count: int) -> float:
        share = (count + 1) / (trials + 2)
        return math.sqrt((1 - share) / ((trials + 2) * share))

    difference = math.sqrt((gained + lost + 2) / ((first + 1) * (second + 1)))
    shrunk = z * difference / (log_error(first) + log_error(second))
    low_first, high_first = _wilson(first, trials, shrunk)
    low_second, high_second = _wilson(second, trials, shrunk)
    return first / second, low_first / high_second, high_first / low_second
