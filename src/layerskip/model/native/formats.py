"""The weight formats of the native decoder: one line each, a file each; `--quantize NAME` reads nothing else.

linear = packed(weight, bias)            # or packed(weight, bias, "int8")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerskip.errors import UserError
from layerskip.model.native.bfloat16 import bfloat16
from layerskip.model.native.int4 import INT4
from layerskip.model.native.int8 import INT8
from layerskip.model.native.linear import Linear, Packed, Plain, packs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from layerskip.model.native.linear import Format

FORMATS: dict[str, Format] = {one.name: one for one in (INT8, INT4)}


def packed(
    weight: Tensor,
    bias: Tensor | None = None,
    quantize: str | None = None,
    head: bool = False,
    compiled: bool = True,
) -> Linear:
    """Lay a weight [out, in] out: in a format, for the compiled product, by oneDNN, or as torch does.

    `head` says that it is a head, or a part of one; `compiled` False keeps to torch's products.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if quantize is not None:
        kind = FORMATS[quantize].of_head if head else FORMATS[quantize]
        return kind.make(weight, bias)
    if compiled and (found := bfloat16(weight, bias)) is not None:
        return found
    return Packed(weight, bias) if packs(weight.dtype, weight.device) else Plain(weight.contiguous(), bias)


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
