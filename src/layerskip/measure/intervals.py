"""Medians of paired ratios with a bootstrap interval. Pure: the seed is given."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A median and the ends of its 95% interval."""

    median: float
    low: float
    high: float

    @property
    def ci95(self) -> list[float]:
        return [self.low, self.high]


def interval(groups: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Take the median of all values and bootstrap it, percentile method, in two stages.

    A group holds the values of one prompt over the trials. Trials of a prompt resemble each other, so prompts
    are drawn with replacement first and trials within each drawn prompt after: an interval from few prompts
    stays wide however many trials there are.
    """
    assert groups
    assert all(groups)
    rng = np.random.default_rng(seed)
    values = [np.asarray(group, dtype=float) for group in groups]
    medians = []
    for _ in range(RESAMPLES):
        drawn = [values[i] for i in rng.integers(len(values), size=len(values))]
        pooled = np.concatenate([group[rng.integers(len(group), size=len(group))] for group in drawn])
        medians.append(np.median(pooled))
    low, high = np.percentile(medians, [2.5, 97.5])
    return Interval(statistics.median(np.concatenate(values).tolist()), float(low), float(high))


def ratios(
    numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]]
) -> list[list[float]]:
    """Divide value by value: same prompt, same trial."""
    return [
        [a / b for a, b in zip(above, below, strict=True)]
        for above, below in zip(numerators, denominators, strict=True)
    ]
