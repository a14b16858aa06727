"""What a pass over several positions costs on this machine, measured once per kind of model and kept in the cache.

costs = measured_row_costs(stack)
costs(6)  # a pass over six positions, in passes over one
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import torch

from layerskip.checkpoint.kept import MACHINE, decoders, keep, kept_file
from layerskip.errors import UserError
from layerskip.model.cost import RowCosts, row_costs
from layerskip.model.stack import Counters
from layerskip.model.step import Step
from layerskip.model.threads import BUSY, busy_cores
from layerskip.reading import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from layerskip.model.cache import Cache
    from layerskip.model.stack import Stack

WIDTHS = (1, 2, 4, 6, 8, 12, 16, 24)  # positions of a pass
CONTEXT = 256  # tokens before them
TURNS = 5
SECONDS = 1.5  # spent at most; a model that needs more keeps the guess
STEEP = 1.0  # of a pass for each position more: only a disturbed measurement says so


def measured_row_costs(stack: Stack) -> RowCosts:
    """Look up what this machine measured for such a model, else measure it; the guess where that takes too long."""
    guess = row_costs(stack.device.type)
    if stack.device.type != "cpu" or (stack.context or CONTEXT) < CONTEXT:
        return guess
    file = kept_file("row-costs", _told(stack))
    costs = None if file is None else _read(file)
    if costs is None:
        if (busy_cores(0.05) or 0.0) > BUSY or (costs := _measured(stack)) is None:
            return guess  # and measure another time
        keep(file, costs.points)
    return costs


@torch.inference_mode()
def _measured(stack: Stack) -> RowCosts | None:
    """Time passes of every width in turn and take the quickest of each: what others do only adds.

    None where that takes too long, or others were in the way nevertheless.
    """
    cache = stack.new_cache(1, CONTEXT + max(WIDTHS))
    kept, stack.counters = stack.counters, Counters()
    try:
        _pass(stack, cache, 1)  # packs weights
        seconds = _pass(stack, cache, 1)
        turns = min(TURNS, int(SECONDS / (seconds * sum(1 + 0.06 * width for width in WIDTHS))))
        if turns < 1:
            return None
        best = dict.fromkeys(WIDTHS, float("inf"))
        for _ in range(turns):
            for width in WIDTHS:
                best[width] = min(best[width], _pass(stack, cache, width))
    finally:
        stack.counters = kept
    points, largest = [], 1.0
    for width in WIDTHS:
        largest = max(largest, best[width] / best[1])
        points.append((width, round(largest, 3)))
    steps = itertools.pairwise(points)
    disturbed = any(c1 - c0 > STEEP * (t1 - t0) for (t0, c0), (t1, c1) in steps)
    return None if disturbed else RowCosts(tuple(points))


def _pass(stack: Stack, cache: Cache, width: int) -> float:
    step = Step.span([0], [CONTEXT], [width], stack.device, spill=CONTEXT + max(WIDTHS))
    began = time.perf_counter()
    tokens = torch.zeros(1, width, dtype=torch.long, device=stack.device)
    h, _ = stack.run(stack.embed(tokens, step), 0, stack.num_layers, step, cache)
    stack.logits(h)
    return time.perf_counter() - began


def _read(file: Path) -> RowCosts | None:
    try:
        points = read_json(file, list, "")
        costs = RowCosts(tuple((int(width), float(cost)) for width, cost in points))
    except (OSError, UserError, TypeError, ValueError):
        return None
    widths, prices = zip(*costs.points, strict=True) if costs.points else ((), ())
    return costs if widths == WIDTHS and all(1 <= price < 100 for price in prices) else None


def _told(stack: Stack) -> list[object]:
    shape = (stack.model_type, stack.num_layers, stack.width, stack.vocab_size, stack.layer_bytes)
    how = (stack.name, str(stack.dtype), stack.row_exact, torch.get_num_threads(), torch.__version__)
    return [shape, how, MACHINE, decoders()]
