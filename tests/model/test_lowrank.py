"""Directions shared out by a budget, rounded to 4 and 8 bits."""

import pytest
import torch

from layerskip.checkpoint.lowrank import (
    Kept,
    chosen,
    directions,
    packed,
    rows,
    stored_bytes,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_rank(rank, *shape):
    return random(shape[0], rank) @ random(rank, shape[1], seed=1)


def restored(matrix, kept):
    return rows(packed(matrix, kept), slice(0, len(matrix)), matrix.shape[1])


def loss(matrix, kept):
    return float((matrix - restored(matrix, kept)).square().sum() / matrix.square().sum())


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (5000, 8), (33, 17)])
def test_a_matrix_of_low_rank_comes_out_at_that_rank_but_for_the_rounding(shape):
    matrix = of_rank(3, *shape)
    kept = chosen({"m": directions(matrix)[0]}, {"m": shape}, 10**9)["m"]
    assert kept == (3, 3)
    assert loss(matrix, kept) < 1e-3
    assert loss(matrix, Kept(3, 0)) < 0.06
    assert loss(matrix, Kept(3, 1)) < loss(matrix, Kept(3, 0))


def test_the_bytes_are_those_counted():
    for shape in ((40, 24), (33, 17)):
        for kept in (Kept(3, 3), Kept(3, 0), Kept(5, 2), Kept(16, 16)):
            parts = packed(random(*shape), kept)
            assert sum(part.nbytes for part in parts.values()) == stored_bytes(shape, kept)


def test_no_rank_costs_more_than_the_whole_matrix_and_that_is_stored_then():
    matrix = random(40, 24)
    kept = chosen({"m": directions(matrix)[0]}, {"m": (40, 24)}, 40 * 28)["m"]
    assert {*packed(matrix, kept)} == {"whole", "scale"}
    assert loss(matrix, kept) < 1e-4
    assert {*packed(matrix, Kept(8, 8))} == {"left8", "right8", "scale8"}


def test_the_budget_goes_where_a_byte_restores_most():
    small, large = random(32, 32), 3 * random(32, 32, seed=1)
    spectra = {"small": directions(small)[0], "large": directions(large)[0]}
    shapes = dict.fromkeys(spectra, (32, 32))
    kept = chosen(spectra, shapes, 400)
    assert kept["large"].rank > kept["small"].rank
    assert sum(stored_bytes((32, 32), kept[name]) for name in kept) <= 400
    assert [kept[name].fine for name in kept] == [0, 0], "another direction is worth more than a finer one"
    wide = chosen({"a": spectra["small"], "b": spectra["small"]}, {"a": (32, 32), "b": (320, 32)}, 400)
    assert wide["a"].rank > wide["b"].rank, "the same square for a tenth of the bytes"


def test_more_budget_never_restores_less():
    matrix = random(48, 32)
    losses = [
        loss(matrix, kept)
        for room in (200, 400, 800, 1200, 1728)
        if (kept := chosen({"m": directions(matrix)[0]}, {"m": (48, 32)}, room)["m"]).rank
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-3


def test_nothing_is_kept_where_nothing_fits():
    matrix = random(48, 32)
    assert chosen({"m": directions(matrix)[0]}, {"m": (48, 32)}, 43) == {"m": Kept()}


def test_singular_directions_of_a_tall_matrix_are_those_of_the_decomposition():
    matrix = random(5000, 6)
    assert torch.allclose(directions(matrix)[0].sqrt(), torch.linalg.svdvals(matrix.double()))
