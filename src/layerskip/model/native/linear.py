"""Matrix products of the native decoder: weights laid out once for the device, a residual added in the same call.

    linear = formats.packed(weight, bias)    # or packed(weight, bias, "int8"): a name in `FORMATS`
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

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

ROWS_HINT = 16  # oneDNN lays weights out for about this many rows: as fast at one, much faster at nine
PROBED_ROWS = (2, 3, 5, 9, 16, 33, 96)


class Linear(ABC):
    """A matrix product with an optional bias; `num_bytes` is what one call reads of its weights."""

    num_bytes: int
    in_features: int
    out_features: int
    least_rows: int = 1
    """The least rows it is to be given, so that the bits of one are those it has beside others."""
    can_be_exact: bool = True
    """Whether a row may have the same bits alone and beside others; `row_exact` tries it."""

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

    can_be_exact = False

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
    summed in another order than several: callers give it `least_rows` at least.
    """

    least_rows = 4

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
    restore: Callable[[tuple[int, int], Mapping[str, Tensor]], Linear] | None = None
    """From (out, in) and the `state` of what was made before, where that may be kept."""
    head: Format | None = None
    """What the head is held in, where this one would cost too much of the text's probability."""

    @property
    def of_head(self) -> Format:
        return self.head or self


def row_exact(linears: Sequence[Linear], dtype: torch.dtype) -> bool:
    """Try one product of each shape: has a row the same bits alone as beside up to 95 others?

    Alone means repeated to `least_rows`, as the stack does.
    """
    least_rows = max(linear.least_rows for linear in linears)
    generator = torch.Generator().manual_seed(0)
    for linear in {(x.in_features, x.out_features): x for x in linears}.values():
        x = torch.randn(PROBED_ROWS[-1], linear.in_features, generator=generator, dtype=dtype)  # [N, in]
        h = torch.randn(PROBED_ROWS[-1], linear.out_features, generator=generator, dtype=dtype)
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
