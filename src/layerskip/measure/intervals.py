"""Bootstrap intervals of medians of paired ratios, ratios of sums, any statistic. Pure: the seed is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000


class _Ends:
    """The ends of a 95% interval."""

    low: float
    high: float

    @property
    def ci95(self) -> list[float]:
        return [self.low, self.high]


@dataclass(frozen=True)
class Interval(_Ends):
    """A median and the ends of its 95% interval."""

    median: float
    low: float
    high: float

    def record(self) -> dict[str, Any]:
        """Say it as result files do."""
        return {"median": self.median, "ci95": self.ci95}


def interval(groups: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Take the median of all values and bootstrap it, percentile method, in two stages.

    A group holds the values of one prompt over the trials. Trials of a prompt resemble each other, so prompts
    are drawn with replacement first and trials within each drawn prompt after: an interval from few prompts
    stays wide however many trials there are.

    Shapes: [P, T], P prompts and T trials, none of them 0.
    """
    values = np.asarray(groups, dtype=float)  # [P, T]
    assert values.ndim == 2
    assert values.size
    prompts, trials = values.shape
    rng = np.random.default_rng(seed)
    prompt = rng.integers(prompts, size=(RESAMPLES, prompts, 1))
    trial = rng.integers(trials, size=(RESAMPLES, prompts, trials))
    medians = np.median(values[prompt, trial].reshape(RESAMPLES, -1), axis=1)  # [RESAMPLES]
    low, high = np.percentile(medians, [2.5, 97.5])
    return Interval(float(np.median(values)), float(low), float(high))


def ratios(
    numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]]
) -> list[list[float]]:
    """Divide value by value: same prompt, same trial."""
    return [
        [a / b for a, b in zip(above, below, strict=True)]
        for above, below in zip(numerators, denominators, strict=True)
    ]


def resampled(statistic: Callable[..., Any], *columns: np.ndarray, seed: int = 0) -> list[float]:
    """95% bootstrap interval of a statistic over items; columns [N] are resampled alike to [RESAMPLES, N]."""
    picks = np.random.default_rng(seed).integers(len(columns[0]), size=(RESAMPLES, len(columns[0])))
    return [float(end) for end in np.percentile(statistic(*(c[picks] for c in columns)), [2.5, 97.5])]


@dataclass(frozen=True)
class Ratio(_Ends):
    """A ratio of two sums over items and the ends of its 95% interval."""

    ratio: float
    low: float
    high: float

    def record(self) -> dict[str, Any]:
        """Say it as result files do."""
        return {"ratio": self.ratio, "ci95": self.ci95}


def ratio_of_sums(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Divide the sums of two columns over the same items. Items of a few rounds have lumpy ratios of their own."""
    a, b = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    low, high = resampled(lambda x, y: x.sum(-1) / y.sum(-1), a, b)
    return Ratio(float(a.sum() / b.sum()), low, high)


def mean_of_ratios(groups: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int = 0) -> Ratio:
    """Average the ratios of sums of several groups, each of which counts alike; items are drawn within a group."""
    rng, ratio, draws = np.random.default_rng(seed), [], []
    for above, below in groups:
        a, b = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
        picks = rng.integers(len(a), size=(RESAMPLES, len(a)))
        ratio.append(a.sum() / b.sum())
        draws.append(a[picks].sum(-1) / b[picks].sum(-1))  # [RESAMPLES]
    low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
    return Ratio(float(np.mean(ratio)), float(low), float(high))
