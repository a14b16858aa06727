"""Choose few combinations of many axes so that every value still meets every value of every other axis."""

import itertools

from conftest import FULL


def pairs(cell):
    """The pairs of places and values that one combination holds."""
    return set(itertools.combinations(enumerate(cell), 2))


def pairwise(*axes):
    """A covering selection of the axes' product, the same on every machine.

    Greedy, pair by pair: a missing pair fixes two values; every other axis takes the value that brings most missing
    pairs with what is fixed already.
    """
    missing = dict.fromkeys(
        pair
        for (i, a), (j, b) in itertools.combinations(enumerate(axes), 2)
        for pair in itertools.product(((i, x) for x in a), ((j, y) for y in b))
    )
    chosen = []
    while missing:
        fixed = dict(next(iter(missing)))
        for place, axis in enumerate(axes):
            if place not in fixed:
                fixed[place] = max(axis, key=lambda value: _gain({**fixed, place: value}, missing))
        cell = tuple(fixed[place] for place in range(len(axes)))
        chosen.append(cell)
        for pair in pairs(cell):
            missing.pop(pair, None)
    return chosen


def _gain(fixed, missing):
    return sum(pair in missing for pair in itertools.combinations(sorted(fixed.items()), 2))


def matrix(*axes):
    """The whole product with LAYERSKIP_FULL=1, else a selection in which all pairs of values meet."""
    return list(itertools.product(*axes)) if FULL else pairwise(*axes)


def by_first(cells):
    """The rest of each combination by its first value."""
    found = {}
    for first, *rest in cells:
        found.setdefault(first, []).append(rest)
    return found
