"""Copies leave greedy output as it is: families, dtypes, sources, lengths, ragged rows, host and device rounds."""

import itertools
from collections import Counter

import pytest
import torch

import tiny
from layerskip.decode.control import LOOKUP, Choice, Controller, Copying, Prices
from layerskip.model.cost import RowCosts
from pairwise import by_first, matrix
from rounds import decode

pytestmark = pytest.mark.matrix
NEW = 32
PROMPTS = [[5, 9, 20, 33, 5, 9, 20], list(range(7, 18)), [40]]
FREE = RowCosts(((1, 1.0), (64, 1.0)))  # positions cost nothing: a row copies wherever it can
SOURCES = ("lookup", "both", "both, E 1")
DTYPES = (torch.float32, torch.float64)


def controller(source, longest, timed=False):
    arms = () if source == "lookup" else (Choice(1 if source.endswith("1") else 2, 3),)
    prices = Prices(tiny.NUM_LAYERS, 0.5, 0.5)
    return Controller(prices, arms, copying=Copying(1, longest, FREE), trained=True, guard=False, timed=timed)


CELLS = by_first(matrix(tiny.STACKS, DTYPES, SOURCES, (1, 3, 8, 16), (1, 3), (False, True), (False, True)))


@pytest.mark.parametrize("family", tiny.STACKS)
def test_copies_leave_the_output_as_it_is(family):
    """Whole matrix in full runs: families, dtypes, sources, lengths, ragged rows, host and device rounds."""
    plain = {dtype: decode(tiny.stack(family, dtype), PROMPTS, NEW).tokens for dtype in DTYPES}
    seen = Counter()
    for dtype, source, longest, rows, device, shared in CELLS[family]:
        stack, own = tiny.stack(family, dtype), controller(source, longest, timed=shared)
        each = {} if shared else {"each": lambda i, s=source, n=longest: {"controller": controller(s, n)}}
        record = decode(
            stack, PROMPTS, NEW, None if source == "lookup" else 2, rows=rows, controller=own if shared else None,
            device_rounds=device, **each,
        )  # fmt: skip
        assert record.tokens == plain[dtype], (dtype, source, longest, rows, device, shared)
        for round in itertools.chain(*record.rounds):
            if round.source == LOOKUP:
                seen[len(round.draft), round.accepted] += 1
    assert {kept > 0 for _, kept in seen} == {False, True}
