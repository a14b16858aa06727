"""Matrix products of the native decoder: weights laid out once for the device, a residual added in the same call.

    linear = packed(weight, bias)            # or packed(weight, bias, "int8"): a name in `FORMATS`
    y = linear(x)               # [B, T, in] -> [B, T, out]
    h = linear.added_to(h, x)   # h + linear(x)

oneDNN's and int8 products can give every row the same bits whatever rows stand beside it, so that verifying
several tokens at once equals decoding them one by one, in 16 bit too. `row_exact` tries it on this machine before
anyone relies on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from layerskip.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

LEAST_ROWS = 4  # a packed product is given so many rows at least: four are faster than one, two or three
ROWS_HINT = 16  # oneDNN lays weights out for about this many rows: as fast at one, much faster at nine
PROBED_ROWS = (2, 3, 5, 9, 16, 33, 96)


class Linear(ABC):
    """A matrix product with an optional bias; `num_bytes` is what one call reads of its weights."""

    num_bytes: int
    in_features: int
    out_features: int

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Shapes: [..., in] -> [..., out]."""

    @abstractmethod
    def added_to(self, h: Tensor, x: Tensor) -> Tensor:
        """Return h + self(x). Shapes: h [..., out], x [..., in] -> [..., out]."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Linear:
        """Keep some of the outputs, in the order of `ids`: a reduced head."""


class Plain(Linear):
    """torch's own product, on any device and in any dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape
        self.num_bytes = _bytes(weight, bias)
        self._transposed = weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def added_to(self, h: Tensor, x: Tensor) -> Tensor:
        if self.bias is not None:
            return h + F.linear(x, self.weight, self.bias)
        flat = torch.addmm(h.flatten(0, -2), x.flatten(0, -2), self._transposed)  # [N, out]
        return flat.view(h.shape)

    def rows(self, ids: Tensor) -> Plain:
        return Plain(self.weight[ids], None if self.bias is None else self.bias[ids])


class Packed(Linear):
    """oneDNN's product with weights reordered once, what Inductor's freezing does (the same private operators).

    Four rows are a fifth faster than one, two or three (on Zen 4), and a single row of a long inner dimension is
    summed in another order than several: callers give it `LEAST_ROWS` at least.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = bias
        self.out_features, self.in_features = weight.shape
        self.num_bytes = _bytes(weight, bias)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = _product(x, self.weight, self.bias, "none", [], "")
        return y

    def added_to(self, h: Tensor, x: Tensor) -> Tensor:
        y: Tensor = _product_added(x, h, self.weight, self.bias, "add")
        return y

    def rows(self, ids: Tensor) -> Packed:
        return Packed(self.weight.to_dense()[ids], None if self.bias is None else self.bias[ids])


_product = torch.ops.mkldnn._linear_pointwise.default
_product_added = torch.ops.mkldnn._linear_pointwise.binary


class Int8(Linear):
    """Weight-only int8 with one scale per output, on torch's own CPU kernel; activations stay bfloat16.

    Every row is summed the same way whatever rows stand beside it. The kernel is made for few rows: nine cost
    2.6 times as much as one, so short drafts suit it.
    """

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        self.weight, self.scales, self.bias = weight, scales, bias
        self.out_features, self.in_features = weight.shape
        self.num_bytes = _bytes(weight, bias) + _bytes(scales, None)

    @classmethod
    def quantized(cls, weight: Tensor, bias: Tensor | None) -> Int8:
        """Round each output's weights to int8 symmetrically: the largest becomes 127."""
        scales = (weight.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # [out]
        scales = scales.to(weight.dtype)  # as they are multiplied with, so that rounding sees the same
        rounded = (weight.float() / scales.float()[:, None]).round().clamp(-127, 127)
        return cls(rounded.to(torch.int8), scales, bias)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scales)  # [N, out]
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def added_to(self, h: Tensor, x: Tensor) -> Tensor:
        return h + self(x)

    def rows(self, ids: Tensor) -> Int8:
        return Int8(self.weight[ids], self.scales[ids], None if self.bias is None else self.bias[ids])


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies this dtype natively here; emulated 16 bit is slower than torch's own."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    native = {
        torch.float32: True,
        torch.bfloat16: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        torch.float16: bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    }
    return native.get(dtype, False)


def fast_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions; oneDNN emulates them on older ones."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native and packs(torch.bfloat16, torch.device("cpu"))


@dataclass(frozen=True)
class Format:
    """A way to hold weights: what `--quantize` calls it, where it runs, how it is made, how it is checked."""

    name: str
    make: Callable[[Tensor, Tensor | None], Linear]
    """From a weight [out, in] and its bias [out]."""
    dtypes: tuple[torch.dtype, ...]
    """Of the activations it is multiplied with; the first one where the dtype is left to us."""
    devices: tuple[str, ...]
    about: str
    """What it costs and gains, in a line of help."""
    tolerance: float
    """Relative difference of the median position's logits from the model's own that its parity check allows."""
    least_rows: int = 1
    """The least rows a product is given, so that the bits of one are those it has beside others."""


def _int8(weight: Tensor, bias: Tensor | None) -> Linear:
    return Int8.quantized(weight, bias)


FORMATS = {
    one.name: one
    for one in (
        Format(
            "int8", _int8, (torch.bfloat16,), ("cpu",), "weights in 8 bit, half the bytes of bfloat16", 0.3
        ),
    )
}


def packed(weight: Tensor, bias: Tensor | None = None, quantize: str | None = None) -> Linear:
    """Lay a weight [out, in] out: in a format, by oneDNN on the CPU where it can, else as torch does."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if quantize is not None:
        return FORMATS[quantize].make(weight, bias)
    return Packed(weight, bias) if packs(weight.dtype, weight.device) else Plain(weight.contiguous(), bias)


def least_rows_of(quantize: str | None, dtype: torch.dtype, device: torch.device) -> int:
    """The least rows a product is given, see `Packed` and `Format`."""
    if quantize is not None:
        return FORMATS[quantize].least_rows
    return LEAST_ROWS if packs(dtype, device) else 1


def require_format(quantize: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Raise UserError for a weight format that has no kernel here."""
    if quantize is None:
        return
    if quantize not in FORMATS:
        raise UserError(f"unknown quantisation {quantize!r}", "known: " + ", ".join(FORMATS))
    one = FORMATS[quantize]
    if device.type not in one.devices:
        raise UserError(f"{quantize} weights have no kernel on {device.type} here", "leave out --quantize")
    if dtype not in one.dtypes:
        names = [str(known).removeprefix("torch.") for known in (*one.dtypes, dtype)]
        raise UserError(
            f"{quantize} weights are multiplied with {', '.join(names[:-1])} activations, not {names[-1]}",
            f"use --dtype {names[0]} (or auto)",
        )


def row_exact(linears: Sequence[Linear], dtype: torch.dtype, least_rows: int) -> bool:
    """Try one product of each shape: has a row the same bits alone as beside up to 95 others?

    Alone means repeated to `least_rows`, as the stack does.
    """
    generator = torch.Generator().manual_seed(0)
    for linear in {(x.in_features, x.out_features): x for x in linears}.values():
        x = torch.randn(PROBED_ROWS[-1], linear.in_features, generator=generator).to(dtype)  # [N, in]
        h = torch.randn(PROBED_ROWS[-1], linear.out_features, generator=generator).to(dtype)
        for count in PROBED_ROWS:
            together, added = linear(x[:count]), linear.added_to(h[:count], x[:count])
            for i in {0, count // 2, count - 1}:
                alone, residual = x[i].repeat(least_rows, 1), h[i].repeat(least_rows, 1)
                if not torch.equal(together[i], linear(alone)[0]):
                    return False
                if not torch.equal(added[i], linear.added_to(residual, alone)[0]):
                    return False
    return True


def _bytes(weight: Tensor, bias: Tensor | None) -> int:
    own = weight.numel() * weight.element_size()
    return own + (0 if bias is None else bias.numel() * bias.element_size())
