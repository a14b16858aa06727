"""A timed pass through a stack: what formats.py and shapes.py compare by its number of positions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from layerskip.model.step import Step

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.model.cache import Cache
    from layerskip.model.stack import Stack

WIDEST = 32  # positions whose logits are all wanted; of a longer pass, a prompt's, the last one's


def timed_pass(stack: Stack, cache: Cache, tokens: Tensor, start: int, count: int) -> float:
    """Run tokens [start, start + count) of [1, n], whose cache has room for n; returns how long that took."""
    began = time.perf_counter()
    step = Step.span([0], [start], [count], stack.device, spill=tokens.shape[1])
    h, _ = stack.run(stack.embed(tokens[:, start : start + count], step), 0, stack.num_layers, step, cache)
    stack.logits(h if count <= WIDEST else h[:, -1:])
    return time.perf_counter() - began
