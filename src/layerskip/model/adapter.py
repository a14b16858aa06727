"""The exit adapter: what the exit knows and what the last layer said one position before, joined for the head.

    z = adapter(h, c)               # [..., D] each: state after E layers; normed state of the position before
    logits = stack.logits(z, head)
    c = stack.finished(z)           # stands in for the last layer's, which the next draft does not know

Verification knows the last layer's state of every position up to the last committed token's predecessor, so the
first draft of a round starts from the real one. The adapter stands on the draft path only: the model is unchanged.

Source: ours; feeding a drafter the target's states is EAGLE's (arXiv 2401.15077), normed ones as in EAGLE-3.1
(arXiv 2605.09992).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from layerskip.errors import UserError
from layerskip.model.native.attention import repeated
from layerskip.model.native.formats import packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

EPS = 1e-6
JOIN = "join.weight"
BLOCK = re.compile(r"blocks\.(\d+)\.(gate_up|down)\.weight")


def adapted(
    h: Tensor,
    c: Tensor,
    join: Callable[[Tensor], Tensor],
    blocks: Iterable[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]],
) -> Tensor:
    """Join two states, then add what each block (gate and up, down) makes of the sum.

    Shapes: h, c [..., D] -> [..., D]; join [..., 2 D] -> [..., D].
    """
    z = join(torch.cat((scaled(h), scaled(c)), -1))
    for gate_up, down in blocks:
        gate, up = gate_up(scaled(z)).chunk(2, -1)
        z = z + down(F.silu(gate) * up)
    return z


def scaled(x: Tensor) -> Tensor:
    """Divide each state by its root mean square. Shapes: [..., D]."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


class Adapter:
    """A trained adapter; `layers` is the E whose states it reads, `known` the width behind the final norm.

    Laid out for the device, dtype and width of states `like` that, in a weight format. `Stack.adapter` makes one.

    Every row has the same bits whatever rows stand beside it, as far as the native stack's products have.
    Raises: UserError for weights that are no adapter of this width.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        layers: int,
        like: Tensor,
        known: int,
        quantize: str | None = None,
    ) -> None:
        check_weights(weights, like.shape[-1], known)
        self.layers, dtype, device = layers, like.dtype, like.device
        ready = {
            name: packed(weight.to(device, dtype), quantize=quantize, head=True)
            for name, weight in weights.items()
        }
        self.join = ready[JOIN]
        self.blocks = [
            (ready[f"blocks.{i}.gate_up.weight"], ready[f"blocks.{i}.down.weight"])
            for i in range(len(weights) // 2)
        ]
        self.num_bytes = sum(linear.num_bytes for linear in ready.values())
        self.least_rows = max(linear.least_rows for linear in ready.values())

    def __call__(self, h: Tensor, c: Tensor) -> Tensor:
        """Shapes: h, c [N, D] -> [N, D]; c behind the final norm."""
        rows = h.shape[0]
        if rows < self.least_rows:  # see `Packed`
            h, c = (repeated(x[None], self.least_rows)[0] for x in (h, c))
        return adapted(h, c, self.join, self.blocks)[:rows]


def check_weights(weights: Mapping[str, Tensor], width: int, known: int) -> None:
    """Refuse what is no adapter for states of this width, and of what the head reads. Raises: UserError."""
    again = "copy or download the folder again, or leave out `exit_adapter` in config.json"
    blocks = (len(weights) - 1) // 2
    names = {JOIN} | {f"blocks.{i}.{part}.weight" for i in range(blocks) for part in ("gate_up", "down")}
    if {*weights} != names:
        raise UserError(
            f"the exit adapter has {', '.join(sorted(weights)) or 'nothing'}, not {JOIN} and blocks", again
        )
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    wanted = {JOIN: (width, width + known)}
    for i in range(blocks):
        down = shapes[f"blocks.{i}.down.weight"]
        hidden = down[1] if len(down) == 2 else 0
        wanted |= {
            f"blocks.{i}.gate_up.weight": (2 * hidden, width),
            f"blocks.{i}.down.weight": (width, hidden),
        }
    if strange := next((name for name in wanted if shapes[name] != wanted[name]), None):
        raise UserError(
            f"the exit adapter's {strange} is {list(shapes[strange])}, the model's width {width}", again
        )
    if not all(weight.is_floating_point() and weight.isfinite().all() for weight in weights.values()):
        raise UserError("the exit adapter has values that are not finite numbers", again)
