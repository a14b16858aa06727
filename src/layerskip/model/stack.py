"""The contract every decoder stands behind: `embed` tokens, `run` a slice of layers, read `logits`.

    step = Step.span(rows=[0], starts=[0], counts=[len(ids)], device=stack.device, spill=cache.capacity)
    h = stack.embed(torch.tensor([ids]), step)          # [B, T, D]
    h, _ = stack.run(h, 0, exit_layer, step, cache)     # layers 1..E, writes their keys and values
    h, _ = stack.run(h, exit_layer, stack.num_layers, step, cache)
    logits = stack.logits(h[:, -1:])                    # float32 [B, 1, V]

Shape letters, fixed everywhere: `B` rows, `T` positions in this call, `S` cache capacity (slots), `D` width,
`V` vocabulary, `L` layers, `E` exit layer (layers executed, 1 <= E <= L), `K` draft length, `H` key/value
heads, `d` size of one head, `N` flattened (row, position) pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from layerskip.errors import UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from layerskip.model.cache import Cache
    from layerskip.model.head import Head


KINDS = ("auto", "native", "hf")


@dataclass
class Step:
    """Everything attention needs to know about one call, built once per call.

    Row b brings `counts[b]` live tokens that stand at positions `starts[b] ..`; the remaining `T - counts[b]`
    columns are padding: they repeat the last live position and write to the spill slot, which nobody reads.
    A row with count 0 is dead (it only fills a static shape). Positions feed the rotary tables, slots say
    where keys and values go; they differ only for trees, whose builder supplies its own `visible`.

    A step made by `on_device` knows starts and counts as tensors only, so one captured graph serves all of them;
    its tuples of starts and counts are empty, and so is `rows` unless row b of the call is row b of the cache.
    """

    rows: tuple[int, ...]  # cache rows
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    positions: Tensor  # [B, T]
    slots: Tensor  # [B, T]
    kv_len: int  # slots [0, kv_len) are read
    visible: Tensor | None = None  # bool [B, T, kv_len], for trees; None means causal
    index: Tensor | None = None  # int64 [B], the cache rows of a step made by `on_device`
    shared: dict[Any, Any] = field(default_factory=dict)  # what stacks compute once per step (rotary, masks)

    @classmethod
    def span(
        cls,
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        device: torch.device,
        spill: int,
    ) -> Step:
        """Lay out consecutive tokens per row; `spill` is the slot padding writes to (the cache's capacity)."""
        width = max(counts)
        offsets = torch.arange(width, device=device)  # [T]
        if len(set(zip(starts, counts, strict=True))) == 1:  # same place in every row: one range serves all
            positions = slots = (offsets + starts[0]).expand(len(rows), width)  # [B, T]
        else:
            first, live = torch.tensor(starts, device=device), torch.tensor(counts, device=device)  # [B]
            positions, slots = _places(first, live, offsets, spill)
        kv_len = max(start + count for start, count in zip(starts, counts, strict=True))
        return cls(tuple(rows), tuple(starts), tuple(counts), positions, slots, kv_len)

    @classmethod
    def on_device(
        cls,
        index: Tensor,
        starts: Tensor,
        counts: Tensor,
        offsets: Tensor,
        kv_len: int,
        spill: int,
        in_place: bool,
    ) -> Step:
        """Lay out the tokens at `offsets` behind each start, in tensor arithmetic only (no host knows where).

        Shapes: index, starts, counts int64 [B], offsets int64 [T]. `kv_len` must cover every live slot; `in_place`
        promises that index is 0 .. B-1, so that the cache is read as views.
        """
        positions, slots = _places(starts, counts, offsets, spill)
        rows = tuple(range(len(index))) if in_place else ()
        return cls(rows, (), (), positions, slots, kv_len, index=index)

    @property
    def width(self) -> int:
        return self.positions.shape[1]

    @property
    def num_live(self) -> int:
        """Count live tokens, the unit of `Counters`; on the device all columns are computed and count."""
        return sum(self.counts) if self.index is None else self.positions.numel()

    @cached_property
    def row_slice(self) -> slice | None:
        """The cache rows as a slice when they are adjacent: reads are then views."""
        if not self.rows:
            return None
        first = self.rows[0]
        adjacent = self.rows == tuple(range(first, first + len(self.rows)))
        return slice(first, first + len(self.rows)) if adjacent else None

    @cached_property
    def uniform(self) -> bool:
        """Whether all rows write the same slots, so that slices replace index lists."""
        return len(set(self.starts)) == 1 and set(self.counts) == {self.width}

    def sees_everything(self, window: int | None) -> bool:
        """Whether every query sees every slot read, so that no mask is needed (plain decoding)."""
        plain = self.visible is None and self.width == 1 and (window is None or self.kv_len <= window)
        return plain and self.uniform

    def from_empty(self, window: int | None) -> bool:
        """Whether the call starts at slot 0, where SDPA's upper-left aligned causal flag is right."""
        plain = self.visible is None and (window is None or self.kv_len <= window)
        return plain and self.uniform and self.starts[0] == 0

    def mask(self, window: int | None) -> Tensor:
        """Say which slots each query may see.

        Shapes: bool [B, 1, T, kv_len], True = attend. `window` keeps the last `window` positions only.
        """
        key = ("mask", window)
        if key not in self.shared:
            slot = torch.arange(self.kv_len, device=self.positions.device)  # [kv_len]
            position = self.positions[:, :, None]  # [B, T, 1]
            seen = slot <= position if self.visible is None else self.visible  # [B, T, kv_len]
            if window is not None:
                seen = seen & (slot > position - window)
            self.shared[key] = seen[:, None]  # [B, 1, T, kv_len]
        mask: Tensor = self.shared[key]
        return mask


def _places(starts: Tensor, counts: Tensor, offsets: Tensor, spill: int) -> tuple[Tensor, Tensor]:
    """Positions and slots [B, T] of the tokens at `offsets` [T] behind starts [B]; see `Step` for padding."""
    first, live = starts[:, None], counts[:, None]  # [B, 1]
    positions = first + torch.minimum(offsets, (live - 1).clamp(min=0))  # [B, T]
    return positions, (first + offsets).masked_fill(offsets >= live, spill)


@dataclass
class Counters:
    """Count the work a stack has done; tests state the exact work of a round with it."""

    runs: Counter[tuple[int, int, int]] = field(default_factory=Counter)  # (start, stop, T) -> calls
    layer_tokens: int = 0  # layers x live tokens through them
    head_rows: Counter[int] = field(default_factory=Counter)  # head size -> rows of logits

    def count_run(self, start: int, stop: int, step: Step) -> None:
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
    row_exact: bool = False  # 16 bit only: a token's bits do not depend on how many a call brings

    @abstractmethod
    def embed(self, tokens: Tensor, step: Step) -> Tensor:
        """Turn tokens [B, T] into hidden states [B, T, D]."""

    @abstractmethod
    def run(
        self, h: Tensor, start: int, stop: int, step: Step, cache: Cache, taps: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the layers [start, stop) and write their keys and values into `cache` at the step's slots.

        Shapes: h [B, T, D] -> [B, T, D]; the dictionary holds the hidden state after k layers for k in taps.
        """

    @abstractmethod
    def logits(self, h: Tensor, head: Head | None = None) -> Tensor:
        """Apply final norm, head and the family's logit transforms.

        Shapes: h [..., D] -> float32 [..., V], or [..., head.size] with a reduced draft head.
        """

    @abstractmethod
    def reduced_head(self, ids: Sequence[int], weight: Tensor | None = None) -> Head:
        """Keep the rows `ids` of the head, for drafting only, or take `weight` [len(ids), D] in their place."""

    @abstractmethod
    def new_cache(self, rows: int, capacity: int) -> Cache:
        """Preallocate keys and values of all layers for `rows` sequences of up to `capacity` tokens.

        Raises: UserError when the memory is not there.
        """


def load(
    path: Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    device_map: Any = None,
    kind: str = "auto",
    quantize: str | None = None,
) -> tuple[Stack, Any]:
    """Load a plain Hugging Face folder; return its stack and the Hugging Face model it came from.

    `kind` auto takes the native stack where the family has one, native insists on it, hf refuses it. The native
    stack takes the model's weights with it: what is returned then is a shell with its configuration.

    Raises: UserError for a model that does not load, or whose slices do not reproduce it.
    """
    from layerskip.model import huggingface, native_load
    from layerskip.model.linear import require_quantizable

    if kind not in KINDS:
        raise UserError(f"unknown stack {kind!r}", nearest(kind, KINDS))
    require_quantizable(quantize, dtype, torch.device(device))
    hf = huggingface.load_model(path, dtype=dtype, device=device, device_map=device_map)
    huggingface.refuse_unsupported(hf)
    reason = (
        "it was refused" if kind == "hf" else native_load.native_reason(hf, placed=device_map is not None)
    )
    if reason is None:
        return native_load.native_stack(hf, quantize=quantize), hf
    if kind == "native" or quantize is not None:
        wanted = "the native stack" if quantize is None else f"{quantize}, which needs the native stack,"
        raise UserError(f"{wanted} cannot be had: {reason}", "leave out --quantize and --stack native")
    return huggingface.HuggingFaceStack(hf), hf
