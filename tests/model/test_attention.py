"""The compiled attention: a position's bits, what it may see, its distance from float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from conftest import ATTENTION, FULL
from layerskip.model.cache import Cache, KVShape
from layerskip.model.native import kernels as compiled
from layerskip.model.step import Step
from pairwise import matrix

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.skipif(compiled.kernels() is None, reason="no C++ compiler"),
]
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
GROUPS = [(9, 3), (2, 2), (7, 1)]  # query heads, key heads
WINDOWS = [None, 6, 100]
SIZES = [64, 128, 80, 33, 7]
STARTS = [*range(0, 260, 13), *range(260, 4096, 239), 4096] if FULL else [0, 1, 61, 64, 250, 700]
MOST = 32


class Attention:
    """A cache of random keys and values, and random new ones for its every slot.

    A call writes those that it brings, so any of its positions can be computed again in other company.
    """

    def __init__(self, dtype, group, size, capacity, rows=1, seed=0):
        self.heads, self.kv_heads = group
        self.scale, self.capacity = size**-0.5, capacity
        generator = torch.Generator().manual_seed(seed)
        self.cache = Cache([KVShape(self.kv_heads, size, size, dtype, CPU)], rows, capacity, 32)
        self.keys, self.values = self.cache.keys[0], self.cache.values[0]
        for store in (self.keys, self.values):
            store.copy_(torch.randn(store.shape, generator=generator))
        shape = (rows, capacity, self.heads + 2 * self.kv_heads, size)
        self.new = torch.randn(shape, generator=generator).to(dtype)

    def __call__(self, rows, starts, counts, window=None):
        """Attend from counts[b] positions behind starts[b]. Shapes: -> [B, T, heads d]."""
        step = Step.span(rows, starts, counts, CPU, spill=self.capacity)
        qkv = torch.stack([self.new[row, step.positions[b]] for b, row in enumerate(rows)])
        kernels = compiled.kernels()
        return kernels.attention(qkv, self.heads, self.scale, None, self.cache, 0, step, window)

    def reference(self, row, position, window=None):
        """What float64 gives for a position. Shapes: -> [heads d]."""
        first = 0 if window is None else max(0, position - window + 1)
        query = self.new[row, position, : self.heads].double().unflatten(0, (self.kv_heads, -1))  # [H, g, d]
        keys, values = (x[row, :, first : position + 1].double() for x in (self.keys, self.values))
        mixed = F.scaled_dot_product_attention(query, keys, values, scale=self.scale)
        return mixed.transpose(0, 1).flatten()  # (place in group, key head)


def one_by_one(attention, start, count, window=None):
    return torch.cat([attention([0], [start + t], [1], window) for t in range(count)], 1)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("dtype", "group", "window", "size"), matrix(DTYPES, GROUPS, WINDOWS, SIZES), ids=str
)
def test_a_position_has_the_same_bits_in_any_company_and_is_what_float64_says(dtype, group, window, size):
    attention = Attention(dtype, group, size, STARTS[-1] + MOST)
    for start in STARTS:
        alone = one_by_one(attention, start, MOST, window)
        for width in range(1, MOST + 1) if FULL else (2, 5, 6, 17, MOST):
            assert torch.equal(attention([0], [start], [width], window), alone[:, :width]), (start, width)
        wanted = torch.stack([attention.reference(0, start + t, window) for t in range(MOST)])
        torch.testing.assert_close(alone[0].double(), wanted, rtol=0, atol=ATTENTION[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    attention, before = Attention(dtype, (9, 3), 64, 1000), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append([attention([0], [start], [6]) for start in (0, 60, 500, 990)])
    torch.set_num_threads(before)
    for same in itertools.chain(*(zip(found[0], other, strict=True) for other in found[1:])):
        assert torch.equal(*same)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_different_lengths_are_computed_as_each_alone(dtype, window):
    """Other rows of the cache, in any order; padding repeats the last position and is not compared."""
    attention = Attention(dtype, (4, 2), 64, 600, rows=5)
    rows, starts, counts = [4, 0, 3], [530, 0, 63], [3, 1, 7]
    together = attention(rows, starts, counts, window)
    for b, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
        for t in range(count):
            assert torch.equal(together[b, t], attention([row], [start + t], [1], window)[0, 0]), (b, t)


@pytest.mark.parametrize("size", [64, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_stays_with_the_positions_that_see_it(dtype, size):
    """Stale slots behind a row's length, slots before a window, and what later positions of the same call bring."""
    for start, window, bad in itertools.product((1, 62, 129, 320), (None, 40), (2, 3)):
        attention = Attention(dtype, (9, 3), size, 400)
        clean = attention([0], [start], [5], window)
        for store in (attention.keys, attention.values):
            store[:, :, start + 5 :] = torch.nan
            if window is not None:
                store[:, :, : max(0, start - window + 1)] = torch.nan
        assert torch.equal(attention([0], [start], [5], window), clean)
        attention.new[:, start + bad] = torch.nan
        found = attention([0], [start], [5], window)
        assert torch.equal(found[:, :bad], clean[:, :bad])
        assert found[:, bad:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_of_scores_that_are_minus_infinity_weighs_nothing(dtype):
    attention = Attention(dtype, (2, 1), 64, 300)
    attention.new[0, 299, :, 0] = 1.0
    wanted = attention([0], [299], [1], 100)
    attention.keys[:, :, :200, 0] = -torch.inf
    torch.testing.assert_close(attention([0], [299], [1]), wanted, rtol=0, atol=ATTENTION[dtype])
