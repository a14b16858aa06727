"""The contract every decoder stands behind: `embed` tokens, `run` a slice of layers, read `logits`.

    step = Step.span(rows=[0], starts=[0], counts=[len(ids)], device=stack.device, spill=cache.capacity)
    h = stack.embed(torch.tensor([ids]), step)          # [B, T, D]
    h, _ = stack.run(h, 0, exit_layer, step, cache)     # layers 1..E, writes their keys and values
    h, _ = stack.run(h, exit_layer, stack.num_layers, step, cache)
    logits = stack.logits(h[:, -1:])                    # float32 [B, 1, V]

Shape letters, fixed everywhere: `B` rows, `T` positions in this call, `S` cache capacity (slots), `D` width,
`V` vocabulary, `L` layers, `E` exit layer (layers executed, 1 <= E <= L; 0, the embedding, is for adapters alone),
`K` draft length, `H` key/value heads, `d` size of one head, `N` flattened (row, position) pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from layerskip.errors import UserError
from layerskip.model.adapter import Adapter
from layerskip.model.head import Head, draft_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from layerskip.model.cache import Cache
    from layerskip.model.step import Step


@dataclass
class Counters:
    """Count the work a stack has done; tests state the exact work of a round with it."""

    runs: Counter[tuple[int, int, int]] = field(default_factory=Counter)  # (start, stop, T) -> calls
    layer_tokens: int = 0  # layers x live tokens through them
    head_rows: Counter[int] = field(default_factory=Counter)  # head size -> rows of logits

    def count_run(self, start: int, stop: int, step: Step) -> None:
        """Note one call of `run`; work is counted in layers x live tokens."""
        self.runs[start, stop, step.width] += 1
        self.layer_tokens += (stop - start) * step.num_live

    def add(self, work: Counters) -> None:
        """Count work once more: a replayed graph runs no Python that could count."""
        self.runs.update(work.runs)
        self.head_rows.update(work.head_rows)
        self.layer_tokens += work.layer_tokens

    def reset(self) -> None:
        self.runs.clear()
        self.head_rows.clear()
        self.layer_tokens = 0


class Stack(ABC):
    """A decoder as a stack of layers with one shared head.

    `run(0, L)` then `logits` equals the Hugging Face model's logits, and `run(0, E)` then `run(E, L)` equals
    `run(0, L)`; loading checks both and refuses a model that fails.
    """

    name: str  # hf, native: what `--stack` calls it
    model_type: str
    num_layers: int
    width: int
    vocab_size: int
    layer_bytes: int  # weights of one layer as stored (the mean, where layers differ)
    head_bytes: int
    table_bytes: int  # embedding table; 0 where it is the head's very storage
    context: int | None  # longest sequence the positions are defined for; None: unbounded
    dtype: torch.dtype
    device: torch.device  # where tokens go in and logits come out
    counters: Counters
    ragged: bool = (
        False  # several positions of one cache row may stand in a call as rows of one position each
    )
    prefill_chunk: int = 512  # positions of a prompt that are best run in one call
    head: Any  # [..., D] -> [..., V], before any transform of the logits
    draft_format: str | None = (
        None  # of the weights that draft alone: they need not be as exact as the model's
    )
    row_exact: bool = False  # 16 bit only: a token's bits do not depend on how many a call brings

    @abstractmethod
    def embed(self, tokens: Tensor, step: Step) -> Tensor:
        """Turn tokens [B, T] into hidden states [B, T, D]."""

    def run(
        self, h: Tensor, start: int, stop: int, step: Step, cache: Cache, taps: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the layers [start, stop) and write their keys and values into `cache` at the step's slots.

        Shapes: h [B, T, D] -> [B, T, D]; the dictionary holds the hidden state after k layers for k in taps.
        """
        given = {k: h for k in taps if k == start}
        if start == stop:
            return h, given
        cache.bind(step)
        self.counters.count_run(start, stop, step)
        h, tapped = self._run(h, range(start, stop), step, cache, [k for k in taps if k != start])
        if stop == self.num_layers:
            cache.write_finals(h, step)
        return h, {**given, **tapped}

    @abstractmethod
    def _run(
        self, h: Tensor, layers: range, step: Step, cache: Cache, taps: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Do what `run` says, for one layer or more."""

    @abstractmethod
    def logits(self, h: Tensor, head: Head | None = None) -> Tensor:
        """Apply final norm, head and the family's logit transforms.

        Shapes: h [..., D] -> float32 [..., V], or [..., head.size] with a reduced draft head.
        """

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Name each row's most probable token, and its logit; NaN where a logit is. Shapes: [N, V] -> [N] each."""
        values, ids = logits.max(-1)
        return ids, values

    def chain(
        self, head: Head | None
    ) -> Callable[[Sequence[int], Tensor, int], tuple[list[list[int]], list[list[float]]]] | None:
        """Greedy drafts of exit layer 0, all of a round in one call, see `native/chain.py`; None: step by step."""
        return None

    @abstractmethod
    def finished(self, h: Tensor) -> Tensor:
        """Apply the final norm: what the head reads. Shapes: [..., D]."""

    @abstractmethod
    def reduced_head(self, ids: Sequence[int], weight: Tensor | None = None) -> Head:
        """Keep the rows `ids` of the head, for drafting only, or take `weight` [len(ids), D] in their place."""

    def draft_head(
        self, size: int, ranked: Sequence[int] | None, always: Sequence[int], rows: Tensor | None = None
    ) -> Head:
        """Build a draft head of `size` tokens, see `draft_ids`; with its own `rows` [ranked, D], the first of them.

        Raises: UserError.
        """
        if rows is None and size == self.vocab_size:
            return Head(torch.arange(size, device=self.device), self.head)
        if rows is None:
            return self.reduced_head(draft_ids(size, self.vocab_size, ranked, always))
        if ranked is None or len(rows) != len(ranked) or not 1 <= size <= len(rows):
            raise UserError(
                f"a draft vocabulary of {size}: the draft head was trained with {len(ranked or ())} tokens",
                "--draft-vocab auto takes them all",
            )
        if rows.shape[1] != self.width or not 0 <= min(ranked) <= max(ranked) < self.vocab_size:
            raise UserError(
                f"the draft head is {list(rows.shape)} up to token {max(ranked)}, the model has width {self.width} "
                f"and {self.vocab_size} tokens",
                "copy or download the folder again, or use --draft-vocab off",
            )
        places = sorted(range(size), key=ranked.__getitem__)
        return self.reduced_head([ranked[place] for place in places], rows[places])

    def adapter(self, weights: Mapping[str, Tensor], layers: int) -> Adapter:
        """Lay out the adapter of the exit after so many layers. Raises: UserError for weights that are none."""
        like = torch.zeros(1, self.width, dtype=self.dtype, device=self.device)
        with torch.inference_mode():
            known = self.finished(like).shape[-1]  # a head may read another width than the layers have
        return Adapter(weights, layers, like, known, self.draft_format)

    @abstractmethod
    def new_cache(self, rows: int, capacity: int) -> Cache:
        """Preallocate keys and values of all layers for `rows` sequences of up to `capacity` tokens.

        Raises: UserError when the memory is not there.
        """
