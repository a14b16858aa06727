"""Weights in 8 bits, one scale an output, half the bytes of bfloat16."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Self

import torch

from layerskip.model.native.linear import Format, Linear
from layerskip.model.native.tiles import GROUP, TILE, Tiled, finite, made, padded, restored, tiled, untiled

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.model.native.kernels import Kernels

ZERO = 128  # what stands for 0 among the unsigned bytes of the kernel


class Int8(Tiled):
    """Weights scale * (w - 128), see `quantized.h`."""

    kernel = "int8"

    @classmethod
    def of(cls, compiled: Kernels, weight: Tensor, bias: Tensor | None) -> Self:
        rounded, scales = symmetric(finite(weight))
        return cls._laid(compiled, rounded, scales, bias)

    @classmethod
    def _laid(cls, compiled: Kernels, rounded: Tensor, scales: Tensor, bias: Tensor | None) -> Self:
        out, size = rounded.shape
        weights = tiled((padded(rounded, TILE, GROUP).to(torch.int16) + ZERO).to(torch.uint8))
        state = {"weights": weights, "scales": padded(scales[:, None], TILE, 1)[:, 0].contiguous()}
        return cls(compiled, (out, size), state | ({} if bias is None else {"bias": bias}))

    def _rounded(self) -> tuple[Tensor, Tensor]:
        assert self.scales is not None
        whole = untiled(self.weights)[: self.out_features, : self.in_features].to(torch.int16) - ZERO
        return whole.to(torch.int8), self.scales[: self.out_features]

    def dense(self) -> Tensor:
        rounded, scales = self._rounded()
        return rounded.float() * scales[:, None]

    def rows(self, ids: Tensor) -> Self:
        rounded, scales = self._rounded()
        return self._laid(
            self.kernels, rounded[ids], scales[ids], None if self.bias is None else self.bias[ids]
        )


class TorchInt8(Linear):
    """The same weights on torch's own CPU kernel, where there is no compiler; inputs stay bfloat16.

    Every row is summed the same way whatever rows stand beside it. The kernel is made for few rows: nine cost
    2.6 times as much as one. It reads beyond sizes that are no multiple of its vectors, hence the padding.
    """

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = padded(weight, TILE, GROUP), bias
        self.scales = padded(scales[:, None], TILE, 1)[:, 0].contiguous()
        self.out_features, self.in_features = weight.shape
        self.num_bytes = self.weight.nbytes + self.scales.nbytes + (0 if bias is None else bias.nbytes)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> TorchInt8:
        rounded, scales = symmetric(finite(weight))
        return cls(rounded, scales.to(weight.dtype), bias)

    def __call__(self, x: Tensor) -> Tensor:
        flat = padded(x.flatten(0, -2), 1, GROUP).contiguous()
        y = torch._weight_int8pack_mm(flat, self.weight, self.scales)[:, : self.out_features]  # [N, out]
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def added_to(self, h: Tensor, x: Tensor) -> Tensor:
        return h + self(x)

    def rows(self, ids: Tensor) -> TorchInt8:
        bias = None if self.bias is None else self.bias[ids]
        return TorchInt8(self.weight[ids, : self.in_features], self.scales[ids], bias)


def symmetric(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each output's weights: the largest becomes 127. Shapes: [out, in] -> int8 [out, in], float32 [out]."""
    scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def _make(weight: Tensor, bias: Tensor | None) -> Linear:
    found: Linear | None = made(Int8, weight, bias)
    return TorchInt8.of(weight.bfloat16(), bias) if found is None else found


INT8 = Format(
    "int8",
    _make,
    (torch.bfloat16,),
    ("cpu",),
    "weights in 8 bit, half the bytes of bfloat16",
    0.3,
    restore=partial(restored, Int8),
)
