"""Weights in bfloat16 on the compiled product, where the processor has AVX2, AVX-512, or is ARM's of 64 bits.

oneDNN reads them at half of what memory gives, has none before AVX-512, and its products are calls that cannot
stand in one with what is between them; it, or torch's own product, stays where there is no compiler or no such
processor.
"""

from __future__ import annotations

import platform
import warnings
from typing import TYPE_CHECKING, Self

import torch

from layerskip.errors import UserError
from layerskip.model.native.kernels import kernels
from layerskip.model.native.linear import packs
from layerskip.model.native.tiles import GROUP, TILE, Tiled, checked, padded

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.model.native.kernels import Kernels

TWO = 2
X86 = ("x86_64", "amd64")


class Bfloat16(Tiled):
    """Weights as they are, in the layout of `bfloat.h`: one chain an output, whatever stands beside it."""

    kernel = "bfloat16"

    @classmethod
    def of(cls, compiled: Kernels, weight: Tensor, bias: Tensor | None) -> Self:
        out, size = weight.shape
        whole = padded(weight.detach(), TILE, GROUP)
        by = whole.view(len(whole) // TILE, TILE, -1, GROUP // TWO, TWO).permute(0, 2, 3, 1, 4)
        state = {"weights": by.contiguous()}  # [tiles, groups, 16, 16, 2]
        return cls(compiled, (out, size), state | ({} if bias is None else {"bias": bias.contiguous()}))

    def dense(self) -> Tensor:
        return self.whole.float()

    def rows(self, ids: Tensor) -> Self:
        return self.of(self.kernels, self.whole[ids], None if self.bias is None else self.bias[ids])

    @property
    def whole(self) -> Tensor:
        """The weights, [out, in]."""
        tiles, groups = self.weights.shape[:2]
        whole = self.weights.permute(0, 3, 1, 2, 4).reshape(tiles * TILE, groups * GROUP)
        return whole[: self.out_features, : self.in_features]


def compiles_bfloat16() -> bool:
    """Whether there is a product of ours."""
    compiled = kernels()
    return compiled is not None and compiled.has(Bfloat16.kernel)


def fast_bfloat16() -> bool:
    """Whether bfloat16 is faster than float32 here: with a product of ours, or instructions for oneDNN's.

    On ARM's processors ours was not timed, so there it is left to who asks for it.
    """
    if compiles_bfloat16() and platform.machine().lower() in X86:
        return True
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native and packs(torch.bfloat16, torch.device("cpu"))


def bfloat16(weight: Tensor, bias: Tensor | None) -> Bfloat16 | None:
    """Lay a weight out; None where it is of another dtype, elsewhere, or there is no such product that is right."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return None
    compiled = kernels()
    if compiled is None or not compiled.has(Bfloat16.kernel):
        return None
    made = Bfloat16.of(compiled, weight, bias)
    try:
        return checked(made) if weight.isfinite().all() else made
    except UserError as error:
        warnings.warn(f"{error.message}: torch multiplies instead, slower", RuntimeWarning, stacklevel=2)
        return None
