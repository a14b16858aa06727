"""The draft head: a subset of the vocabulary's rows, used for drafting only, perhaps behind an adapter.

Drafting with fewer rows stays exact: the draft law is zero outside the subset, which `accept` handles like any
other draft law (FR-Spec, arXiv 2502.14856). Verification always uses the full head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from layerskip.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from layerskip.model.adapter import Adapter

DRAFT_VOCABULARIES = (1024, 2048, 4096, 8192, 16384, 32768)
"""Sizes worth trying; the whole head is one more."""


@dataclass(frozen=True)
class Head:
    """Rows of the output projection with the token ids they stand for."""

    ids: Tensor  # int64 [size], ascending
    project: Callable[[Tensor], Tensor]  # [..., D] -> [..., size]
    num_bytes: int = 0  # of its own copy of the rows
    adapter: Adapter | None = None  # makes of an exit's state what the rows read; `logits` does not apply it

    def adapts(self, exit_layer: int) -> bool:
        """Whether drafts of this exit go through the adapter."""
        return self.adapter is not None and self.adapter.layers == exit_layer

    @property
    def size(self) -> int:
        return len(self.ids)

    def scatter(self, logits: Tensor, vocab_size: int) -> Tensor:
        """Spread [..., size] over the full vocabulary, -inf elsewhere: [..., V]."""
        full = logits.new_full((*logits.shape[:-1], vocab_size), -torch.inf)
        full[..., self.ids] = logits
        return full


def adapter_of(head: Head | None, exit_layer: int) -> Adapter | None:
    """Find what drafts of this exit go through on their way to the head."""
    return head.adapter if head is not None and head.adapts(exit_layer) else None


def draft_ids(size: int, vocab_size: int, ranked: Sequence[int] | None, always: Sequence[int]) -> list[int]:
    """Choose the token ids of a draft vocabulary of `size`, in ascending order.

    `ranked` lists ids by falling frequency (a checkpoint's draft vocabulary file). Without it, and behind its
    end, the lowest ids are taken: byte-pair vocabularies number their merges in the order they were learned,
    most frequent first. `always` (the end-of-sequence ids) is included whatever its rank.

    Raises: UserError for a size outside 1..vocab_size, or a ranked id the model does not have.
    """
    if not 1 <= size <= vocab_size:
        raise UserError(
            f"draft vocabulary of {size} tokens: the model has {vocab_size}",
            f"give --draft-vocab a number from 1 to {vocab_size}, or off",
        )
    strange = next((token for token in ranked or () if not 0 <= token < vocab_size), None)
    if strange is not None:
        raise UserError(
            f"the draft vocabulary names token {strange}, the model's end at {vocab_size - 1}",
            "layerskip draft-vocab writes a new one, or use --draft-vocab off",
        )
    first = [token for token in dict.fromkeys(always) if 0 <= token < vocab_size][:size]
    order = [*first, *(ranked or ()), *range(vocab_size)]
    return sorted(list(dict.fromkeys(order))[:size])
