"""Attention of the native decoder: rotary angles, the cache write, and reading no more than the length in use.

Query heads that share keys are rows of one block, so keys are never expanded. There are two forms with one
result up to rounding: torch's operations, anywhere; and the compiled kernel for few positions on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.model.cache import Cache
    from layerskip.model.native.kernels import Kernels
    from layerskip.model.step import Step

SLOTS = 32  # lengths read are rounded up to this where rows must be exact; what is read too much is masked
ROWS_PER_CALL = 32  # query rows of one attention call where rows must be exact
MOST_EXACT_ROWS = (
    32  # positions of one call that torch's kernel is made to sum alike: a verification, not a prompt
)
MOST_COMPILED = (
    256  # positions of one call of the compiled kernel, which sums all alike; more would need much memory
)


@dataclass
class Attention:
    """What all layers share. `rotary` is Hugging Face's own module: it computes the tables once."""

    heads: int
    kv_heads: int
    size: int  # d
    scale: float
    dtype: torch.dtype
    device: torch.device
    rotary: Any
    context: int | None
    exact: bool  # sum every row alike, however many positions a call has
    kernels: Kernels | None = None
    _tables: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def padded_group(self) -> int:
        return -(-self.group // 4) * 4

    @property
    def can_be_exact(self) -> bool:
        """Whether it is compiled, or reading a padded group on into the next heads stays inside the buffer."""
        return self.kernels is not None or self.padded_group - self.group <= 2 * self.kv_heads

    def __call__(
        self,
        qkv: Tensor,
        layer: int,
        step: Step,
        cache: Cache,
        window: int | None,
        rotary: bool,
        padded: int = 0,
    ) -> Tensor:
        """Write this call's keys and values, attend, and return heads in the order (place in group, key head).

        Shapes: qkv [B, T, heads + 2 H, d] (may be changed) -> [B, T, heads d]; one row's result may be wanted
        `padded` by repeating its first position, [1, padded, heads d].
        """
        angles = self.angles(step, cache.capacity) if rotary else None
        if self.kernels is not None and step.width <= MOST_COMPILED:
            return self.kernels.attention(
                qkv, self.heads, self.scale, angles, cache, layer, step, window, padded
            )
        if angles is not None:
            qkv = self._turned(qkv, *angles)
        cache.write_both(layer, qkv[:, :, self.heads :].transpose(1, 2), step)
        mixed = self._mixed(qkv, layer, step, cache, window)
        return repeated(mixed, padded) if padded else mixed

    def _mixed(self, qkv: Tensor, layer: int, step: Step, cache: Cache, window: int | None) -> Tensor:
        """Attend over the slots in use with torch's kernel. Shapes: as in `__call__`.

        Where rows must be exact, the kernel is given what makes it sum every row alike (tried with torch 2.13):
        each position's rows padded to a multiple of four by reading on into the next heads, at most 32 rows a
        call, and a number of slots that is a multiple of 32.
        """
        rows, width, _, size = qkv.shape
        exact = self.exact and width <= MOST_EXACT_ROWS
        padded = self.padded_group if exact else self.group
        most = max(1, ROWS_PER_CALL // padded) if exact else width
        length = self._length(step)
        keys, values = cache.read(layer, step, length)
        along = qkv.stride()
        strides = (along[0], self.group * size, along[1], size, 1)
        query = qkv.as_strided((rows, self.kv_heads, width, padded, size), strides, qkv.storage_offset())
        blocks = [query] if most >= width else torch.split(query, most, 2)
        mixed = [
            F.scaled_dot_product_attention(
                block.reshape(rows, self.kv_heads, -1, size), keys, values, attn_mask=mask, scale=self.scale
            ).transpose(1, 2)  # [B, T' g, H, d], as the kernel writes it
            for block, mask in zip(blocks, self._masks(step, window, padded, most), strict=True)
        ]
        whole = mixed[0] if len(mixed) == 1 else torch.cat(mixed, 1)
        if padded != self.group:
            whole = whole.reshape(rows, width, padded, self.kv_heads, size)[:, :, : self.group]
        return whole.reshape(rows, width, -1)

    def _length(self, step: Step) -> int:
        return -(-step.kv_len // SLOTS) * SLOTS if self.exact else step.kv_len

    def _masks(self, step: Step, window: int | None, group: int, most: int) -> list[Tensor | None]:
        """Build, once per step and window, what is added to the scores: 0 or -inf, None where all is seen.

        Shapes: one [B, 1, T' group, n] for every `most` positions ([B, 1, 1, n] for one position).
        """
        key = ("native masks", window, group)
        if key not in step.shared:
            length, width = self._length(step), step.width
            masks: list[Tensor | None] = [None] * -(-width // most)
            if not (step.sees_everything(window) and length == step.kv_len):
                seen = F.pad(step.mask(window)[:, 0], (0, length - step.kv_len))  # [B, T, n]
                added = torch.zeros_like(seen, dtype=self.dtype).masked_fill_(~seen, -torch.inf)
                added = added[:, None] if width == 1 else added.repeat_interleave(group, 1)[:, None]
                masks = list(torch.split(added, most * group, 2))
            step.shared[key] = masks
        shared: list[Tensor | None] = step.shared[key]
        return shared

    def angles(self, step: Step, capacity: int) -> tuple[Tensor, Tensor]:
        """Look the step's cosines and sines up, once per step: [B, T, r] each, r = rotary dimensions."""
        if "native angles" not in step.shared:
            if self._tables is None or len(self._tables[0]) < capacity:
                length = 1 << max(6, (capacity - 1).bit_length())
                # Tables that change with the length must not be asked for more than the context.
                length = max(capacity, min(length, self.context or length))
                positions = torch.arange(length, device=self.device)[None]
                like = torch.empty(0, dtype=self.dtype, device=self.device)
                cos, sin = self.rotary(like, positions)  # [1, n, r]
                self._tables = cos[0].contiguous(), sin[0].contiguous()
                self._kept.append(self._tables)  # captured graphs read the smaller ones by their address
            if step.uniform and len(step.rows) == 1:  # a view
                start = step.starts[0]
                angles = tuple(table[None, start : start + step.width] for table in self._tables)
            else:
                angles = tuple(table[step.positions] for table in self._tables)
            step.shared["native angles"] = angles
        shared: tuple[Tensor, Tensor] = step.shared["native angles"]
        return shared

    def _turned(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn queries and keys by their positions' angles. Shapes: qkv [B, T, heads + 2 H, d], cos [B, T, r]."""
        turning, size = self.heads + self.kv_heads, cos.shape[-1]
        x = qkv[:, :, :turning, :size]
        half = size // 2
        signed = torch.cat(
            (-sin[..., :half], sin[..., half:]), -1
        )  # x cos + swapped(x) signed turns both halves
        turned = torch.addcmul(x * cos[:, :, None], x.roll(half, -1), signed[:, :, None])
        if size != qkv.shape[-1]:
            turned = torch.cat((turned, qkv[:, :, :turning, size:]), -1)
        return torch.cat((turned, qkv[:, :, turning:]), 2)


def repeated(h: Tensor, rows: int) -> Tensor:
    """Pad one row's positions to so many by repeating the first. Shapes: [1, T, D] -> [1, rows, D]."""
    return torch.cat((h, h[:, :1].expand(-1, rows - h.shape[1], -1)), 1)
