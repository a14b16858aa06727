"""What an exit adapter learns from how many tokens: a line through committed measurements, and its uncertainty.

    curve = curve_of(recipe)                             # None where no curve was measured for such a recipe
    curve.predicted(2_000_000)["tokens_per_round"]       # Estimate(middle, low, high) and whether it extrapolates

Figures rise with every doubling of the tokens, so the line is fitted over their binary logarithm by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from layerskip.reading import read_json
from layerskip.train.job.recipe import FOLDER

if TYPE_CHECKING:
    from layerskip.train.job.recipe import Recipe

POINTS = FOLDER / "curves.json"
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Two-sided 95% quantiles of Student's t for 1 to 10 degrees of freedom."""


def t95(freedom: int) -> float:
    """Give the 95% quantile of Student's t; infinite for no degree of freedom.

    Source: above 10 the expansion in 1 / freedom, right to the second digit.
    """
    if freedom < 1:
        return math.inf
    return T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.37 / freedom + 2.8 / freedom**2


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95% interval."""

    middle: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        return Estimate(self.middle * factor, self.low * factor, self.high * factor)

    def within(self, least: float, most: float) -> Estimate:
        """Cut what cannot be."""
        return Estimate(*(min(max(value, least), most) for value in (self.middle, self.low, self.high)))

    def record(self) -> dict[str, Any]:
        return {"middle": self.middle, "ci95": [self.low, self.high]}


@dataclass(frozen=True)
class Line:
    """A least-squares line y = height + slope (x - mean), and how far points lie from it (`spread`)."""

    slope: float
    height: float
    mean: float
    square: float
    """Sum of (x - mean)^2."""
    spread: float
    count: int

    def at(self, x: float) -> Estimate:
        """Predict a new point, not the line alone: its own scatter is in the interval."""
        away = self.spread * math.sqrt(1 + 1 / self.count + (x - self.mean) ** 2 / self.square)
        return self._around(self.height + self.slope * (x - self.mean), away)

    def rise(self) -> Estimate:
        """Give the slope: what y gains where x grows by one."""
        return self._around(self.slope, self.spread / math.sqrt(self.square))

    def _around(self, middle: float, error: float) -> Estimate:
        """The interval of a value whose standard error is known from the points."""
        away = error * t95(self.count - 2) if error else 0.0
        return Estimate(middle, middle - away, middle + away)


def fitted(points: Sequence[tuple[float, float]]) -> Line:
    """Fit a line to three or more points (x, y) of different x."""
    n = len(points)
    mean, height = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    square = sum((x - mean) ** 2 for x, _ in points)
    slope = sum((x - mean) * (y - height) for x, y in points) / square
    rest = sum((y - height - slope * (x - mean)) ** 2 for x, y in points)
    return Line(slope, height, mean, square, math.sqrt(rest / (n - 2)), n)


@dataclass(frozen=True)
class Curve:
    """Measured points (tokens, agreement of the first draft, tokens per round) and where they stand."""

    source: str
    drafts: int
    points: tuple[tuple[float, float, float], ...]
    chance: tuple[float, float] = (0.0, 0.0)
    """How far two runs of the same settings lie apart, in both figures: no fit knows a point better."""

    def predicted(self, tokens: float) -> dict[str, Any]:
        """Predict agreement and tokens per round after so many tokens; both within what can be.

        Outside the points nobody knows whether the line goes on: the interval reaches to its nearest measured end.
        """
        seen = [point[0] for point in self.points]
        nearest = min(max(tokens, min(seen)), max(seen))

        def estimate(figure: int) -> Estimate:
            line = fitted([(math.log2(point[0]), point[figure]) for point in self.points])
            line = replace(line, spread=max(line.spread, self.chance[figure - 1]))
            found, end = line.at(math.log2(tokens)), line.at(math.log2(nearest)).middle
            return Estimate(found.middle, min(found.low, end), max(found.high, end))

        agreement, per_round = estimate(1), estimate(2)
        return {
            "agreement": agreement.within(0.0, 1.0).record(),
            "tokens_per_round": per_round.within(1.0, 1.0 + self.drafts).record(),
            "draft_length": self.drafts,
            "extrapolated": tokens != nearest,
            "measured_from": min(seen),
            "measured_to": max(seen),
            "source": self.source,
        }


def curve_of(recipe: Recipe) -> Curve | None:
    """Find the curve of a recipe's kind: that of an adapter on the embedding, whatever the recipe is called."""
    if not (recipe.exit_adapter and recipe.exits == [0]):
        return None
    told = read_json(POINTS, dict)["exit-adapter"]
    points = ((p["tokens"], p["right"][0], p["tokens_per_round"]) for p in told["points"])
    return Curve(told["source"], told["drafts"], tuple(points), tuple(told["chance"]))
