"""The selection that `make test` runs of a matrix leaves no pair of values out, and is small."""

import itertools
from pathlib import Path

import pytest

import tiny
from pairwise import pairs, pairwise

AXES = {
    "one axis of two": ("ab", "xyz"),
    "lossless": (tiny.STACKS, ("float32", "float64"), (1, 2, 4), (0, 1, 3, 8), (1, 3)),
    "equal sizes": ((1, 2, 3),) * 5,
    "an axis of one value": ("ab", (None,), "xyz", (True, False)),
}


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_every_value_meets_every_value_of_every_other_axis(axes):
    chosen = pairwise(*axes)
    wanted = set().union(*(pairs(cell) for cell in itertools.product(*axes)))
    assert set().union(*(pairs(cell) for cell in chosen)) == wanted
    assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_the_selection_is_small_and_the_same_every_time(axes):
    chosen, (largest, second) = pairwise(*axes), sorted(map(len, axes))[:-3:-1]
    assert chosen == pairwise(*axes)
    assert len(chosen) <= 2 * largest * second, "a pair of the two longest axes is the least there can be"


def test_whoever_samples_says_so_and_is_run_whole_by_the_marker():
    files = [path for path in Path(__file__).parent.rglob("test_*.py") if path != Path(__file__)]
    sampling = {path.name for path in files if "from pairwise import" in path.read_text()}
    assert len(sampling) > 3
    marked = ("\npytestmark = pytest.mark.matrix\n", "\n    pytest.mark.matrix,\n")  # alone, or in a list
    assert sampling == {path.name for path in files if any(mark in path.read_text() for mark in marked)}
