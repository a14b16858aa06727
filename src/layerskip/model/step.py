"""Where the tokens of one call stand: cache rows, positions, slots, what each may see."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass
class Step:
    """Everything attention needs to know about one call, built once per call.

    Row b brings `counts[b]` live tokens that stand at positions `starts[b] ..`; the remaining `T - counts[b]`
    columns are padding: they repeat the last live position and write to the spill slot, which nobody reads.
    A row with count 0 is dead (it only fills a static shape). Positions feed the rotary tables, slots say
    where keys and values go; they differ in padding only.

    A step made by `on_device` knows starts and counts as tensors only, so one captured graph serves all of them;
    its tuples of starts and counts are empty, and so is `rows` unless row b of the call is row b of the cache.
    """

    rows: tuple[int, ...]  # cache rows
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    positions: Tensor  # [B, T]
    slots: Tensor  # [B, T]
    kv_len: int  # slots [0, kv_len) are read
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
        """T: columns of the call, padding included."""
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
        return self.width == 1 and (window is None or self.kv_len <= window) and self.uniform

    def from_empty(self, window: int | None) -> bool:
        """Whether the call starts at slot 0, where SDPA's upper-left aligned causal flag is right."""
        return (window is None or self.kv_len <= window) and self.uniform and self.starts[0] == 0

    def mask(self, window: int | None) -> Tensor:
        """Say which slots each query may see.

        Shapes: bool [B, 1, T, kv_len], True = attend. `window` keeps the last `window` positions only.
        """
        key = ("mask", window)
        if key not in self.shared:
            slot = torch.arange(self.kv_len, device=self.positions.device)  # [kv_len]
            position = self.positions[:, :, None]  # [B, T, 1]
            seen = slot <= position  # [B, T, kv_len]
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
