"""Greedy drafts of an exit that runs no layer, several in one call, see `drafts.h`.

    chain = Chain.of(stack, head)               # None where part of it is not compiled
    drafts = chain([7, 9], known, steps=3)      # [[.., .., ..], [.., .., ..]]

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
    from layerskip.model.native.stack import NativeStack


class Chain:
    """An adapter and a draft head, all of one format, between a stack's embedding and its final norm."""

    def __init__(self, stack: NativeStack, head: Head, products: Sequence[Tiled]) -> None:
        self._stack, self._head, self._kernel = stack, head, products[0].kernel
        join, *blocks, last = [product.laid for product in products]
        pairs = list(zip(blocks[::2], blocks[1::2], strict=True))
        self._blocks = (Block * len(pairs))(*[Block(*pair) for pair in pairs])
        self._laid = Drafts(
            0, 0, stack.width, len(pairs), join, last, self._blocks, stack.table.data_ptr(),
            stack.finish.gain.data_ptr(), stack.embed_scale or 1.0, stack.finish.eps, EPS, head.ids.data_ptr(),
        )  # fmt: skip

    @classmethod
    def of(cls, stack: NativeStack, head: Head | None) -> Chain | None:
        """Put the parts together; None where one is not compiled, or there is no adapter of exit layer 0."""
        adapter = adapter_of(head, 0)
        if head is None or adapter is None or stack.kernels is None or stack.finish.gain.dtype != stack.dtype:
            return None
        products = [adapter.join, *(part for block in adapter.blocks for part in block), head.project]
        tiled = [product for product in products if isinstance(product, Tiled) and product.bias is None]
        alike = len({product.kernel for product in tiled}) == 1 and len(tiled) == len(products)
        return cls(stack, head, tiled) if alike and stack.table.is_contiguous() else None

    def __call__(self, tokens: Sequence[int], known: Tensor, steps: int) -> list[list[int]]:
        """Draft behind each row's last token: N lists of `steps`.

        Shapes: known [N, D], what the head read at the position before.
        """
        rows, kernels = len(tokens), self._stack.kernels
        assert kernels is not None
        found = torch.empty(steps + 1, rows, dtype=torch.long)
        found[0] = torch.tensor(tokens)
        self._laid.rows, self._laid.steps = rows, steps
        kernels.drafts(self._kernel, self._laid, known.clone(memory_format=torch.contiguous_format), found)
        self._stack.counters.head_rows[self._head.size] += rows * steps
        drafts: list[list[int]] = found[1:].T.tolist()
        return drafts
