"""The cache: slots, rollback, and that freed rows are clean."""

import pytest
import torch

from layerskip.errors import UserError
from layerskip.model import cache as caches
from layerskip.model.cache import Cache, KVShape
from layerskip.model.step import Step

SHAPE = KVShape(2, 4, 4, torch.float32, torch.device("cpu"))


def span(rows, starts, counts, capacity=8):
    return Step.span(rows, starts, counts, torch.device("cpu"), spill=capacity)


def written(cache, rows, starts, counts, value):
    """Write a constant at the step's slots of every layer."""
    step = span(rows, starts, counts, cache.capacity)
    cache.bind(step)
    kv = torch.full((len(rows), 2, step.width, 4), float(value))
    for layer in range(len(cache.keys)):
        cache.update(kv, -kv, layer)
    return step


@pytest.fixture
def cache():
    return Cache([SHAPE] * 3, rows=4, capacity=8)


def test_ragged_rows_write_to_their_own_slots_and_padding_to_the_spill(cache):
    written(cache, [0, 2], [1, 5], [3, 1], 7)
    for layer in range(3):
        occupied = cache.keys[layer][:, 0, :, 0] != 0
        assert occupied[0].tolist() == [False, True, True, True] + [False] * 5
        assert occupied[2].tolist() == [False] * 5 + [True, False, False, True]
        assert not occupied[[1, 3]].any()


def test_reads_of_adjacent_rows_are_views_and_others_are_equal_copies(cache):
    written(cache, [0, 1, 2, 3], [0] * 4, [8] * 4, 3)
    adjacent = cache.read(0, span([1, 2], [4, 4], [1, 1]))[0]
    assert adjacent.data_ptr() == cache.keys[0][1].data_ptr()
    scattered = cache.read(0, span([0, 3], [4, 2], [1, 1]))[0]
    assert torch.equal(scattered, cache.keys[0][[0, 3], :, :5])
    assert adjacent.shape == (2, 2, 5, 4), "only the used length is read"


def test_rollback_is_setting_a_length_and_the_next_write_overwrites(cache):
    written(cache, [0], [0], [6], 1)
    cache.set_length(0, 3)
    written(cache, [0], [3], [1], 9)
    keys = cache.read(2, span([0], [3], [1]))[0]
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 9]


def test_a_freed_row_is_zero_again_and_given_out_lowest_first(cache):
    rows = [cache.allocate() for _ in range(4)]
    assert rows == [0, 1, 2, 3]
    assert cache.allocate() is None
    written(cache, [1], [0], [5], torch.nan)
    cache.free(3)
    cache.free(1)
    assert cache.allocate() == 1
    assert not cache.keys[0][1].isnan().any()


def test_a_cache_that_grows_keeps_its_rows_and_its_spill_slot_moves(cache):
    written(cache, [2], [0], [5], 7)
    cache.set_length(2, 5)
    cache.grow(40)
    assert (cache.capacity, cache.lengths[2]) == (40, 5)
    keys, values = cache.read(2, span([2], [5], [1]))
    assert keys[0, 0, :, 0].tolist() == [7] * 5 + [0]
    assert values[0, 1, :, 0].tolist() == [-7] * 5 + [0]
    assert cache.both[0] is None or cache.both[0].shape[2] == cache.keys[0].shape[2]


def test_a_cache_that_does_not_fit_is_a_user_error_before_it_is_made(monkeypatch):
    monkeypatch.setattr(caches, "available_bytes", lambda device: 10_000)
    Cache([SHAPE], rows=1, capacity=100)
    with pytest.raises(UserError, match=r"not enough memory .* 2 row\(s\) of 1000 tokens need") as error:
        Cache([SHAPE], rows=2, capacity=1000)
    assert "--max-new-tokens" in error.value.hint


def test_an_allocation_that_fails_is_the_same_user_error(monkeypatch):
    monkeypatch.setattr(caches, "available_bytes", lambda device: None)
    with pytest.raises(UserError, match="not enough memory"):
        Cache([SHAPE], rows=2**20, capacity=2**20)


def test_the_size_is_that_of_the_tensors(cache):
    assert cache.num_bytes == 3 * 4 * 9 * SHAPE.token_bytes


def test_growth_that_fails_half_way_leaves_a_cache_that_works(cache, monkeypatch):
    """The capacity was the new one while some layers had the old size: writes went past their end."""
    capacity, store, calls = cache.capacity, caches._store, []

    def failing(*given):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return store(*given)

    monkeypatch.setattr(caches, "_store", failing)
    with pytest.raises(UserError, match="not enough memory"):
        cache.grow(40)
    assert cache.capacity == capacity
    monkeypatch.undo()
    cache.grow(40)
    assert {key.shape[2] for key in cache.keys} == {cache.keys[0].shape[2]}
