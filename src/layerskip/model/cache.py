"""One preallocated key/value cache for all layers: a length per row, rollback by setting a length.

Slots [0, length) of a row hold the first `length` tokens of its sequence in the first `depth` layers. What lies
beyond is stale: it is masked or not read, and overwritten by the next write. Draft and verification write
into the same cache at different layers, so exit layer and draft length may change every round at no cost.
"""

from __future__ import annotations

import functools
import heapq
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from layerskip.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from layerskip.model.step import Step


@dataclass(frozen=True)
class KVShape:
    """What one layer keeps per token."""

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in this layer."""
        return self.heads * (self.key_size + self.value_size) * self.dtype.itemsize


class Cache:
    """Keys and values of every layer, `[rows, H, slots, d]` each, slots = capacity + 1 rounded up to `multiple`.

    The slot behind the capacity takes the writes of padding (see `Step`); no query ever sees it. Memory is zeroed
    at the start and when a used row is given out again: masked slots get probability 0, but 0 times a stale NaN
    would be NaN.
    """

    def __init__(self, shapes: Sequence[KVShape], rows: int, capacity: int, multiple: int = 1) -> None:
        self.shapes, self.capacity, self.multiple = tuple(shapes), capacity, multiple
        self.lengths = [0] * rows
        self.depths = [len(shapes)] * rows  # layers valid up to the row's length
        self._free = list(range(rows))
        self._touched = [0] * rows  # slots written since the row was last zeroed
        self._step: Step | None = None
        self.finals: Tensor | None = None  # [rows, 1, slots, D], see `keep_finals`
        require_memory(shapes, rows, capacity)
        self.both: list[Tensor | None] = []  # keys above values, where they are of one size
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for shape in shapes:
            both, key, value = self._store(shape, capacity)
            self.both.append(both)
            self.keys.append(key)
            self.values.append(value)

    def _store(self, shape: KVShape, capacity: int) -> tuple[Tensor | None, Tensor, Tensor]:
        try:
            return _store(shape, len(self.lengths), self._slots(capacity))
        except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError on the CPU
            raise _no_memory(self.shapes, len(self.lengths), capacity) from error

    def _slots(self, capacity: int) -> int:
        return -(-(capacity + 1) // self.multiple) * self.multiple

    def grow(self, capacity: int) -> None:
        """Make room for more tokens a row, layer by layer, in new tensors; what the rows hold stays.

        Stopped half-way, by an interrupt or for want of memory, it leaves the capacity as it was and some layers
        larger than they need be. Raises: UserError when the memory is not there.
        """
        require_memory(self.shapes, len(self.lengths), capacity - self.capacity)
        held = self.capacity
        for layer, shape in enumerate(self.shapes):
            both, key, value = self._store(shape, capacity)
            key[:, :, :held] = self.keys[layer][:, :, :held]
            value[:, :, :held] = self.values[layer][:, :, :held]
            self.both[layer], self.keys[layer], self.values[layer] = both, key, value
        if self.finals is not None:
            grown = self.finals.new_zeros(
                *self.finals.shape[:2], self._slots(capacity), self.finals.shape[-1]
            )
            grown[:, :, :held] = self.finals[:, :, :held]
            self.finals = grown  # once it is filled: an interrupt must not lose what was there
        self.capacity = capacity

    def keep_finals(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Keep what the last layer says of every position, [width] each, for a drafter that reads it.

        `Stack.run` writes it at a step's slots wherever it ends with the last layer; it rolls back as keys do.
        """
        self.finals = torch.zeros(
            len(self.lengths), 1, self._slots(self.capacity), width, dtype=dtype, device=device
        )

    def write_finals(self, h: Tensor, step: Step) -> None:
        """Put the last layer's states h [B, T, D] at the step's slots, where they are kept."""
        if self.finals is not None:
            _put(self.finals, h[:, None].to(self.finals.device), step)

    def finals_at(self, rows: Sequence[int] | Tensor, slots: Sequence[int] | Tensor) -> Tensor:
        """Get the last layer's states where it has written them. Shapes: rows, slots [N] -> [N, D]."""
        assert self.finals is not None, "keep_finals was not called"
        if len(rows) == 1 and not isinstance(rows, torch.Tensor):  # a view: lists are made tensors first
            return self.finals[rows[0], :, slots[0]]
        return self.finals[rows, 0, slots]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors)

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return (*self.keys, *self.values, *(() if self.finals is None else (self.finals,)))

    @property
    def devices(self) -> set[torch.device]:
        return {tensor.device for tensor in self.keys}

    # -- rows ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def allocate(self) -> int | None:
        """Take the lowest free row (so that busy rows stay adjacent), zeroed, or None when all are taken."""
        if not self._free:
            return None
        row = self._free[0]
        for tensor in self._tensors:
            tensor[row, :, : self._touched[row]].zero_()
            tensor[row, :, self.capacity :].zero_()  # the spill slot: masked, but a NaN there would count
        self._touched[row] = self.lengths[row] = 0
        return heapq.heappop(self._free)  # once it is clean: an interrupt must not lose it

    def free(self, row: int) -> None:
        """Give a row back. It is cleaned when it is given out again, so that no step waits for it."""
        self.lengths[row] = 0
        heapq.heappush(self._free, row)

    def set_length(self, row: int, length: int, depth: int | None = None) -> None:
        """Declare the first `length` slots of a row valid in the first `depth` layers (default: unchanged)."""
        assert 0 <= length <= self.capacity, (length, self.capacity)
        self.lengths[row] = length
        if depth is not None:
            self.depths[row] = depth

    @torch.inference_mode()
    def copy(self, source: int, row: int, length: int) -> None:
        """Give a row what another one holds of its first `length` tokens, in all layers."""
        for tensor in self._tensors:
            tensor[row, :, :length] = tensor[source, :, :length]
        self.touch(row, length)
        self.set_length(row, length, self.depths[source])

    # -- writing and reading ---------------------------------------------------------------------------------

    def bind(self, step: Step) -> None:
        """Set where the coming `update` calls write and what they read."""
        self._step = step
        if step.index is None:
            for row, start in zip(step.rows, step.starts, strict=True):
                self.touch(row, start + step.width)

    def touch(self, row: int, stop: int) -> None:
        """Note that slots up to `stop` are written; whoever makes a step with `on_device` says so beforehand."""
        self._touched[row] = max(self._touched[row], min(stop, self.capacity))

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write and read for the bound step: the one method Hugging Face attentions call.

        Shapes: key, value [B, H, T, d] -> views or copies [B, H, kv_len, d].
        """
        assert self._step is not None, "bind a step before running layers"
        self.write(layer_idx, key, value, self._step)
        return self.read(layer_idx, self._step)

    def write(self, layer: int, key: Tensor, value: Tensor, step: Step) -> None:
        """Put key, value [B, H, T, d] at the step's slots."""
        for store, new in ((self.keys[layer], key), (self.values[layer], value)):
            _put(store, new, step)

    def write_both(self, layer: int, both: Tensor, step: Step) -> None:
        """Put keys above values [B, 2 H, T, d] at the step's slots, in one copy."""
        store = self.both[layer]
        assert store is not None, "keys and values of one size"
        _put(store, both, step)

    def read(self, layer: int, step: Step, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Get keys and values [B, H, n, d] of the step's rows; adjacent rows are views, others copies.

        n is `length` (a stack may read more than it needs and mask the rest), by default the step's `kv_len`.
        """
        length = step.kv_len if length is None else length
        key, value = self.keys[layer].narrow(2, 0, length), self.values[layer].narrow(2, 0, length)
        if len(step.rows) == len(self.lengths) and step.row_slice is not None:
            return key, value
        if step.row_slice is not None:
            return key[step.row_slice], value[step.row_slice]
        index = _rows(step, key.device)
        return key.index_select(0, index), value.index_select(0, index)


def _put(store: Tensor, new: Tensor, step: Step) -> None:
    if step.row_slice is not None and step.uniform:
        start = step.starts[0]
        store[step.row_slice, :, start : start + step.width] = new
    else:
        index = _rows(step, store.device)[:, None]  # [B, 1]
        store[index, :, step.slots.to(store.device)] = new.transpose(1, 2)  # [B, T, H, d]


def _store(shape: KVShape, rows: int, slots: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Allocate one layer: keys and values as views of one tensor where they can be."""
    make = functools.partial(torch.zeros, dtype=shape.dtype, device=shape.device)
    if shape.key_size == shape.value_size:
        both = make(rows, 2 * shape.heads, slots, shape.key_size)
        return both, both[:, : shape.heads], both[:, shape.heads :]
    sizes = shape.key_size, shape.value_size
    key, value = (make(rows, shape.heads, slots, size) for size in sizes)
    return None, key, value


def _rows(step: Step, device: torch.device) -> Tensor:
    return torch.tensor(step.rows, device=device) if step.index is None else step.index


def require_memory(shapes: Sequence[KVShape], rows: int, capacity: int) -> None:
    """Raise UserError when the cache will not fit, before the system starts to swap or kill.

    The CPU maps zeroed pages lazily, so an allocation alone would succeed and fail much later.
    """
    for device in {shape.device for shape in shapes}:
        needed = sum(s.token_bytes for s in shapes if s.device == device) * rows * (capacity + 1)
        available = available_bytes(device)
        if available is not None and needed > available:
            raise _no_memory(shapes, rows, capacity, available)


def available_bytes(device: torch.device) -> int | None:
    """Estimate the free memory of a device; None where it cannot be known."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held  # torch keeps freed memory for itself
    if device.type != "cpu" or not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _no_memory(
    shapes: Sequence[KVShape], rows: int, capacity: int, available: int | None = None
) -> UserError:
    needed = sum(shape.token_bytes for shape in shapes) * rows * (capacity + 1)
    room = "" if available is None else f", {available / 2**30:.2f} GiB are free"
    return UserError(
        f"not enough memory for the key/value cache: {rows} row(s) of {capacity} tokens need "
        f"{needed / 2**30:.2f} GiB{room}",
        "lower --max-new-tokens (or the context), send fewer rows at once, or use a 16-bit --dtype",
    )
