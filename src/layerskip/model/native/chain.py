"""Greedy drafts of an exit that runs no layer, several in one call, see `drafts.h`.

    chain = stack.chain(head)                   # None where part of it is not compiled
    drafts, chances = chain([7, 9], known, steps=3)     # [[.., .., ..], [.., .., ..]] each

A draft is four small products; called one by one they cost as much again in Python, allocations and threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from layerskip.model.adapter import EPS
from layerskip.model.head import adapter_of
from layerskip.model.native.kernels import Block, Drafts
from layerskip.model.native.tiles import Tiled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from layerskip.model.head import Head
    from layerskip.model.native.layer import Norm
    from layerskip.model.stack import Counters


class Chain:
    """An adapter and a draft head, all of one format, between a stack's embedding and its final norm."""

    def __init__(
        self,
        head: Head,
        products: Sequence[Tiled],
        table: Tensor,
        scale: float,
        finish: Norm,
        counters: Counters,
    ) -> None:
        self._head, self._counters, self._kernels = head, counters, products[0].kernels
        self._kernel = products[0].kernel
        join, *blocks, last = [product.laid for product in products]
        pairs = list(zip(blocks[::2], blocks[1::2], strict=True))
        self._held = table, finish, products, (Block * len(pairs))(*[Block(*pair) for pair in pairs])
        self._laid = Drafts(
            0, 0, table.shape[1], len(pairs), join, last, self._held[-1], table.data_ptr(),
            finish.gain.data_ptr(), scale, finish.eps, EPS, head.ids.data_ptr(),
        )  # fmt: skip

    @classmethod
    def of(
        cls, head: Head | None, table: Tensor, scale: float | None, finish: Norm, counters: Counters
    ) -> Chain | None:
        """Put the parts together; None where one is not compiled, or there is no adapter of exit layer 0."""
        adapter = adapter_of(head, 0)
        if head is None or adapter is None or finish.gain.dtype != table.dtype or not table.is_contiguous():
            return None
        products = [adapter.join, *(part for block in adapter.blocks for part in block), head.project]
        tiled = [product for product in products if isinstance(product, Tiled) and product.bias is None]
        alike = len({product.kernel for product in tiled}) == 1 and len(tiled) == len(products)
        alike = alike and len({down.in_features for _, down in adapter.blocks}) <= 1  # they share their room
        return cls(head, tiled, table, scale or 1.0, finish, counters) if alike else None

    def __call__(
        self, tokens: Sequence[int], known: Tensor, steps: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Draft behind each row's last token: N lists of `steps`, and the probability the head gives each draft.

        Shapes: known [N, D], what the head read at the position before.
        """
        rows = len(tokens)
        found, chances = (
            torch.empty(steps + 1, rows, dtype=torch.long),
            torch.empty(steps, rows, dtype=torch.float32),
        )
        found[0] = torch.tensor(tokens)
        self._laid.rows, self._laid.steps = rows, steps
        known = known.clone(memory_format=torch.contiguous_format)
        self._kernels.drafts(self._kernel, self._laid, known, found, chances)
        self._counters.head_rows[self._head.size] += rows * steps
        return found[1:].T.tolist(), chances.T.tolist()
