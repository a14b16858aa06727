"""Weights as the compiled products read them: tiles of 16 outputs, groups of 32 inputs.

    w = tiled(q)            # uint8 [out, in] -> [tiles, groups, 8, 16, 4]
    q = untiled(w, out, size)

What `products.h` says of the layout, in torch, here for bytes. Rounding is the formats' own: `int8.py`, `int4.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F

from layerskip.errors import UserError
from layerskip.model.native.kernels import Kernels, Product, kernels
from layerskip.model.native.linear import Linear

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

TILE, GROUP, FOUR = 16, 32, 4
STATE = ("weights", "scales", "bias")
Checked = TypeVar("Checked", bound="Tiled")
MATCHES = 0.02  # relative difference that rounding inputs to 8 bits explains, with room


class Tiled(Linear):
    """A product of a compiled kernel. Exact: a row is prepared and summed alone, whatever stands beside it."""

    kernel: ClassVar[str]
    bias: Tensor | None

    def __init__(self, kernels: Kernels, size: tuple[int, int], state: Mapping[str, Tensor]) -> None:
        self.kernels, (self.out_features, self.in_features) = kernels, size
        self.weights = state["weights"]
        self.scales, self.bias = state.get("scales"), state.get("bias")
        self.num_bytes = sum(tensor.nbytes for tensor in self.state.values())
        pointers = [None if one is None else one.data_ptr() for one in (self.weights, self.scales, self.bias)]
        self.laid = Product(0, self.in_features, self.out_features, *pointers)

    @property
    def state(self) -> dict[str, Tensor]:
        """What a file must hold to make it again."""
        held = {name: getattr(self, name) for name in STATE}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.product(self.kernel, self.laid, x, None)

    def added_to(self, h: Tensor, x: Tensor) -> Tensor:
        return self.kernels.product(self.kernel, self.laid, x, h)

    @abstractmethod
    def rows(self, ids: Tensor) -> Self: ...

    @abstractmethod
    def dense(self) -> Tensor:
        """The weights as numbers, float32 [out, in]."""


def made(kind: type[Tiled], weight: Tensor, bias: Tensor | None) -> Any:
    """Round a weight [out, in] and lay it out; None without a compiler. Raises: UserError for one not finite."""
    compiled = kernels()
    return None if compiled is None else checked(kind.of(compiled, weight, bias))  # type: ignore[attr-defined]


def restored(kind: type[Tiled], size: tuple[int, int], state: Mapping[str, Tensor]) -> Tiled:
    """Make a product again from what was kept of it."""
    compiled = kernels()
    assert compiled is not None, "what was kept is read where it can be used"
    return kind(compiled, size, {name: state[name] for name in STATE if name in state})


def finite(weight: Tensor) -> Tensor:
    """Refuse what cannot be rounded. Raises: UserError."""
    weight = weight.detach().float()
    if not weight.isfinite().all():
        raise UserError(
            "a weight is NaN or infinite, which no format of few bits can hold",
            "the model is damaged: download it again; or leave out --quantize",
        )
    return weight


def checked(linear: Checked) -> Checked:
    """Compare a product with torch's on the first outputs: a compiler may be wrong. Raises: UserError."""
    few = min(linear.out_features, 2 * TILE + 3)
    tiles = -(-few // TILE)
    most = {"weights": tiles, "scales": tiles * TILE, "bias": few}
    first = {name: tensor[: most[name]] for name, tensor in linear.state.items()}
    some = type(linear)(linear.kernels, (few, linear.in_features), first)
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = F.linear(x.float(), some.dense(), None if some.bias is None else some.bias.float())
    if not (some(x).float() - wanted).norm() <= MATCHES * wanted.norm() + 1e-6:
        raise UserError(
            f"the compiled {linear.kernel} product gives wrong numbers here",
            "set LAYERSKIP_KERNELS=off, or leave out --quantize",
        )
    return linear


def padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """Round both sizes up to multiples, with zeros. Shapes: [out, n]."""
    missing = (0, -x.shape[1] % columns, 0, -x.shape[0] % rows)
    return F.pad(x, missing) if any(missing) else x


def tiled(q: Tensor) -> Tensor:
    """Lay bytes out. Shapes: uint8 [out, in], multiples of 16 and 32 -> [tiles, groups, 8, 16, 4]."""
    out, size = q.shape
    by = q.view(out // TILE, TILE, size // GROUP, GROUP // FOUR, FOUR)
    return by.permute(0, 2, 3, 1, 4).contiguous()


def untiled(w: Tensor) -> Tensor:
    """What `tiled` was given. Shapes: [tiles, groups, 8, 16, 4] -> [out, in], both rounded up."""
    tiles, groups = w.shape[:2]
    return w.permute(0, 3, 1, 2, 4).reshape(tiles * TILE, groups * GROUP)
