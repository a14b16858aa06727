"""Weights in 4 bits, a scale and a least value for 32 of an output: 5 bits each in all, as in Q4_1 of GGUF files.

What was rounded so before (the built-in models', any Q4_1 file's once it is a checkpoint) is found again bit for
bit: the least and the largest of a group tell its two numbers.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Self

import torch

from layerskip.model.native.int8 import INT8
from layerskip.model.native.linear import Format, Linear
from layerskip.model.native.tiles import (
    FOUR,
    GROUP,
    TILE,
    Tiled,
    finite,
    made,
    padded,
    restored,
    tiled,
    untiled,
)

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.model.native.kernels import Kernels

MOST = 15
NIBBLES = TILE * GROUP // 2  # bytes of a group of a tile, before its scales


class Int4(Tiled):
    """Weights scale * w + least, see `quantized.h`."""

    kernel = "int4"

    @classmethod
    def of(cls, compiled: Kernels, weight: Tensor, bias: Tensor | None) -> Self:
        return cls._laid(compiled, *grouped(finite(weight)), bias, weight.shape[1])

    @classmethod
    def _laid(
        cls, compiled: Kernels, whole: Tensor, scale: Tensor, least: Tensor, bias: Tensor | None, size: int
    ) -> Self:
        """Shapes: whole uint8 [out, groups, 32], scale and least float16 [out, groups]."""
        out, groups = scale.shape
        both = tiled(padded(whole.view(out, -1), TILE, GROUP))  # [tiles, groups, 8, 16, 4]
        half = GROUP // FOUR // 2
        nibbles = (both[:, :, :half] | both[:, :, half:] << 4).flatten(2)

        def laid(x: Tensor) -> Tensor:
            by = padded(x, TILE, 1).view(-1, TILE, groups).transpose(1, 2).contiguous()
            return by.view(torch.uint8).view(-1, groups, 2 * TILE)

        state = {"weights": torch.cat((nibbles, laid(scale), laid(least)), -1).contiguous()}
        return cls(compiled, (out, size), state | ({} if bias is None else {"bias": bias}))

    def _grouped(self) -> tuple[Tensor, Tensor, Tensor]:
        tiles, groups = self.weights.shape[:2]
        nibbles, scale, least = torch.split(self.weights, [NIBBLES, 2 * TILE, 2 * TILE], -1)
        both = torch.cat((nibbles & MOST, nibbles >> 4), -1).view(tiles, groups, GROUP // FOUR, TILE, FOUR)
        whole = untiled(both).view(-1, groups, GROUP)

        def back(x: Tensor) -> Tensor:
            by = x.contiguous().view(torch.float16).view(tiles, groups, TILE)
            return by.transpose(1, 2).reshape(-1, groups)

        return tuple(part[: self.out_features] for part in (whole, back(scale), back(least)))  # type: ignore[return-value]

    def dense(self) -> Tensor:
        whole, scale, least = self._grouped()
        numbers = whole.float() * scale.float()[..., None] + least.float()[..., None]
        return numbers.flatten(1)[:, : self.in_features]

    def rows(self, ids: Tensor) -> Self:
        whole, scale, least = (part[ids] for part in self._grouped())
        bias = None if self.bias is None else self.bias[ids]
        return self._laid(self.kernels, whole, scale, least, bias, self.in_features)


class TorchInt4(Linear):
    """The same weights on torch's own CPU kernel, where there is no compiler; inputs stay bfloat16."""

    def __init__(self, whole: Tensor, scale: Tensor, least: Tensor, bias: Tensor | None, size: int) -> None:
        self.parts, self.bias = (whole, scale, least), bias
        self.out_features, self.in_features = len(whole), size
        whole, scale, least = (padded(part.flatten(1), TILE, 1) for part in self.parts)
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.int(), 1)
        least = least.float() + 8 * scale.float()  # its zero stands for 8
        self.scales = torch.stack((scale.float(), least), -1).bfloat16().transpose(0, 1).contiguous()
        self.num_bytes = self.weight.nbytes + self.scales.nbytes + (0 if bias is None else bias.nbytes)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> TorchInt4:
        return cls(*grouped(finite(weight)), bias, weight.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        flat = padded(x.flatten(0, -2), 1, GROUP).contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.weight, GROUP, self.scales)
        y = y[:, : self.out_features]
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def added_to(self, h: Tensor, x: Tensor) -> Tensor:
        return h + self(x)

    def rows(self, ids: Tensor) -> TorchInt4:
        whole, scale, least = (part[ids] for part in self.parts)
        return TorchInt4(whole, scale, least, None if self.bias is None else self.bias[ids], self.in_features)


def grouped(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round groups of 32 between their least and their largest value.

    Shapes: float32 [out, in] -> uint8 [out, groups, 32], scale and least float16 [out, groups]. A last group that
    is not full goes on with its last value.
    """
    out, size = weight.shape
    missing = -size % GROUP
    if missing:
        weight = torch.cat((weight, weight[:, -1:].expand(out, missing)), 1)
    by = weight.view(out, -1, GROUP)
    low, high = by.amin(-1), by.amax(-1)
    scale, least = ((high - low) / MOST).half(), low.half()
    if not (scale.isfinite() & least.isfinite()).all():
        scale, least = (x.clamp(-65504, 65504) for x in (scale, least))
    step = scale.float()[..., None]
    whole = torch.where(step > 0, (by - least.float()[..., None]) / step, 0.0)
    return whole.round().clamp(0, MOST).to(torch.uint8), scale, least


def _make(weight: Tensor, bias: Tensor | None) -> Linear:
    found: Linear | None = made(Int4, weight, bias)
    return TorchInt4.of(weight, bias) if found is None else found


INT4 = Format(
    "int4", _make, (torch.bfloat16,), ("cpu",), "weights in 4 bit, a third of the bytes of bfloat16", 0.5,
    restore=partial(restored, Int4), head=INT8,
)  # fmt: skip
