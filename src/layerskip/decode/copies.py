"""How many tokens each row copies, where a step reads the weights once for all its rows.

    lengths, gain = best_lengths(chances, price)     # [3, 0, 1] tokens; tokens per price, in plain steps

`chances` are those of `History.chances`; `price(n)` is what n positions more cost, in plain steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul

TURNS = 4  # of looking for the best copies of all rows


def best_lengths(
    chances: Sequence[Sequence[float]], price: Callable[[int], float], padded: bool = False
) -> tuple[list[int], float]:
    """Find the lengths with most tokens per price of the round as a whole, and how much that is.

    A row copies as far as each token is worth its price at the rate that all reach together, which is found by
    turns (Dinkelbach, 1967). Rows that are `padded` to the widest choose a common length, and copy what they can.
    """
    num_rows, longest = len(chances), max(map(len, chances))
    lengths = [0] * num_rows
    if not longest:
        return lengths, 1.0
    width = num_rows if padded else 1
    prices = [price(length * width) for length in range(longest + 1)]
    gains = [[0.0, *accumulate(accumulate(own, mul))] for own in chances]  # by length: tokens more
    if padded:
        return _padded(gains, prices)
    rate = float(num_rows)
    for _ in range(TURNS):
        tried = [max(range(len(own)), key=lambda k: own[k] - rate * prices[k]) for own in gains]
        gained = sum(own[k] for own, k in zip(gains, tried, strict=True))
        reached = (num_rows + gained) / (1 + price(sum(tried)))
        if reached <= rate:
            break
        lengths, rate = tried, reached
    return lengths, rate / num_rows


def _padded(gains: Sequence[Sequence[float]], prices: Sequence[float]) -> tuple[list[int], float]:
    """The best common length where a step is as wide as its longest copy: each row copies as far as it can."""

    def rate(length: int) -> float:
        gained = sum(own[min(length, len(own) - 1)] for own in gains)
        return (len(gains) + gained) / (1 + prices[length])

    best = max(range(len(prices)), key=rate)
    return [min(best, len(own) - 1) for own in gains], rate(best) / len(gains)
