"""What a handful of noisy trials says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


class Summary(NamedTuple):
    """Median, quartiles and extremes of some trials."""

    median: float
    q1: float
    q3: float
    least: float
    most: float


class Ratio(NamedTuple):
    """A ratio of medians with its confidence interval (bootstrap, 95 %)."""

    value: float
    low: float
    high: float

    @property
    def tie(self) -> bool:
        """Whether the interval contains 1: then nobody is faster."""
        return self.low <= 1 <= self.high

    def __str__(self) -> str:
        return (
            f"{self.value:.2f}x ({self.low:.2f} to {self.high:.2f}{', a tie' if self.tie else ''})"
        )


def summarize(values: Sequence[float]) -> Summary:
    """Of at least one value."""
    least, q1, median, q3, most = np.percentile(values, [0, 25, 50, 75, 100]).tolist()
    return Summary(median, q1, q3, least, most)


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """The median of the pairs' ratios, for trials taken in turns: entry i of both is one turn.

    Pairs are resampled, not values, so that what slowed a whole turn down cancels (B. Efron,
    "Bootstrap methods", 1979: the percentile interval). The same input gives the same interval.
    """
    pairs = np.asarray(above, float) / np.asarray(below, float)
    rng = np.random.default_rng(0)
    resampled = np.median(rng.choice(pairs, (RESAMPLES, len(pairs))), axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail]).tolist()
    return Ratio(float(np.median(pairs)), low, high)
