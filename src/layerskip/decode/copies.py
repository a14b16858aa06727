"""How many tokens each row copies, where a step reads the weights once for all its rows.

    lengths, gain = best_lengths(chances, price)     # [3, 0, 1] tokens; tokens per price, in plain steps

`chances` are those of `History.chances`; `price(n)` is what n positions more cost, in plain steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

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
    able = [b for b, own in enumerate(chances) if own]
    if not able:
        return lengths, 1.0
    width = num_rows if padded else 1
    prices = np.array([price(length * width) for length in range(longest + 1)])
    gains = np.full((len(able), longest + 1), -np.inf)  # tokens more, by length
    gains[:, 0] = 0.0
    for place, b in enumerate(able):
        gains[place, 1 : len(chances[b]) + 1] = np.cumsum(np.cumprod(chances[b]))
    if padded:
        rates = (num_rows + np.maximum.accumulate(gains, 1).sum(0)) / (1 + prices)
        best = int(rates.argmax())
        return [min(best, len(own)) for own in chances], float(rates[best]) / num_rows
    rate, places = float(num_rows), np.arange(len(able))
    for _ in range(TURNS):
        tried = (gains - rate * prices).argmax(1)
        reached = (num_rows + float(gains[places, tried].sum())) / (1 + price(int(tried.sum())))
        if reached <= rate:
            break
        rate = reached
        for b, length in zip(able, tried.tolist(), strict=True):
            lengths[b] = length
    return lengths, rate / num_rows
