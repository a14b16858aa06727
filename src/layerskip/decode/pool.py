"""Engines kept between calls where graphs were captured on their caches (CUDA), each lent to one user at a time.

engine = pool.take(rows, capacity, draft_head)
...
pool.give_back(engine)
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from layerskip.decode.engine import Engine
from layerskip.errors import UserError

if TYPE_CHECKING:
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack

LEAST = 256  # tokens of a kept engine's rows; from there on powers of two


class EnginePool:
    """Make engines of a stack; keep the last one that was given back where `keep` says so."""

    def __init__(self, stack: Stack, keep: bool | None = None) -> None:
        self.stack = stack
        self.keep = stack.device.type == "cuda" if keep is None else keep
        self.last: Engine | None = None

    def take(self, rows: int, capacity: int, head: Head | None, finals: bool = False) -> Engine:
        """Find or make an engine for as many rows of at least `capacity` tokens, see `Engine` for `finals`."""
        made = partial(Engine, self.stack, rows=rows, draft_head=head, finals=finals)
        if not self.keep:
            return made(capacity=capacity)
        rounded = rounded_capacity(capacity, self.stack.context)
        last, self.last = self.last, None  # lent: two streams must not share it
        if last is not None and last.serves(rows, rounded, head, finals):
            return last
        del last  # its cache must not stand beside the new one
        try:
            return made(capacity=rounded)
        except UserError:
            return made(capacity=capacity)

    def give_back(self, engine: Engine) -> None:
        """Take an engine back, empty, for the next call."""
        if self.keep:
            self.last = engine


def rounded_capacity(capacity: int, context: int | None) -> int:
    """Round up to a power of two, within the model's context: few capacities make few graphs."""
    return min(max(LEAST, 1 << (capacity - 1).bit_length()), context or 1 << 62)
