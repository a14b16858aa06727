"""Layer dropout per sample on any Hugging Face decoder, which really saves the work it drops.

`keep_masks` draws which rows skip which layers; `LayerDropout` wraps the `forward` of each decoder layer: kept
rows are gathered, run with every per-sample argument sliced alike, and scattered back. No parameter is
renamed, `detach` leaves the model as it was, and a model in evaluation mode is not touched.

Source: LayerSkip (arXiv 2404.16710), section 3.1.1; the residual scale follows arXiv 2609.05275.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from layerskip.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

_WORDS = 4  # 64-bit words that one counter of numpy's Philox gives
_WHOLE = ("cache_position",)  # arguments that are per token, whatever their size


def keep_masks(rates: Sequence[float], seed: int, step: int, first_row: int, rows: int) -> NDArray[np.bool_]:
    """Which layers run which rows, [L, rows]: True is kept.

    Numbers are addressed by (seed, optimiser step, row of the step's global batch, layer), so how a batch is cut
    into accumulated parts or spread over ranks, a restart and a recomputed activation cannot change them.
    """
    blocks = -(-len(rates) // _WORDS)
    key = np.array([seed, step], dtype=np.uint64)
    generator = np.random.Philox(key=key, counter=[first_row * blocks, 0, 0, 0])
    raw = generator.random_raw(rows * blocks * _WORDS).reshape(rows, blocks * _WORDS)[:, : len(rates)]
    uniform = (raw >> np.uint64(11)) * 2.0**-53  # [rows, L] in [0, 1)
    kept: NDArray[np.bool_] = (uniform >= np.asarray(rates)).T
    return kept


class LayerDropout:
    """Skip layers for single rows of a batch, as told by `set` before each forward pass.

    With `distributed`, a rank that keeps no row of a layer sends one through with its effect multiplied by zero:
    sharded layers then issue the same collectives on every rank and every parameter has a gradient.
    """

    def __init__(
        self, layers: Sequence[Any], residual_scale: str = "none", distributed: bool = False
    ) -> None:
        self.layers = list(layers)
        self.inverse = residual_scale == "inverse"
        self.distributed = distributed
        self.rates: list[float] = []
        self.kept: NDArray[np.bool_] | None = None
        self._indices: list[Tensor] = []
        self._replaced: list[Any] = []

    def attach(self) -> None:
        """Wrap the forward of every layer; `detach` puts it back."""
        assert not self._replaced, "attached already"
        for index, layer in enumerate(self.layers):
            replaced = layer.__dict__.get("forward")
            self._replaced.append(replaced)
            layer.forward = self._wrapped(index, _of_class(layer) if replaced is None else replaced)

    def detach(self) -> None:
        for layer, replaced in zip(self.layers, self._replaced, strict=True):
            if replaced is None:
                del layer.forward
            else:
                layer.forward = replaced
        self._replaced = []

    def set(self, rates: Sequence[float], kept: NDArray[np.bool_] | None, device: torch.device) -> None:
        """Say who is kept, [L, rows], in the passes to come; None runs everything. One copy to the device."""
        self.rates, self.kept = list(rates), kept
        if kept is None:
            return
        flat = torch.from_numpy(np.nonzero(kept)[1].astype(np.int64)).to(device, non_blocking=True)
        self._indices = list(torch.split(flat, kept.sum(axis=1).tolist()))

    def _wrapped(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        # The gather depends on numbers a compiler cannot know: it is left out of graphs, the layer itself is not.
        disable: Any = torch.compiler.disable
        cut = disable(sliced)

        @functools.wraps(original)
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            kept = self.kept
            if kept is None or not self.layers[index].training:
                return original(hidden, *args, **kwargs)
            rows = hidden.shape[0]
            if kept.shape[1] != rows:
                raise RuntimeError(f"layer dropout was set for {kept.shape[1]} rows, the batch has {rows}")
            count = int(kept[index].sum())
            scale = 1.0 / (1.0 - self.rates[index]) if self.inverse and self.rates[index] < 1.0 else 1.0
            if count == rows and scale == 1.0:
                return original(hidden, *args, **kwargs)
            if count == 0:
                if not self.distributed:
                    return hidden
                chosen, scale = torch.zeros(1, dtype=torch.long, device=hidden.device), 0.0
            else:
                chosen = self._indices[index]
            args, kwargs = cut(args, chosen, rows), cut(kwargs, chosen, rows)
            part = hidden if count == rows else hidden.index_select(0, chosen)
            out = original(part, *args, **kwargs)
            if isinstance(out, tuple):
                out = out[0]
            if scale != 1.0:
                out = part + (out - part) * scale
            return out if count == rows else hidden.index_copy(0, chosen, out.to(hidden.dtype))

        disabled: Callable[..., Any] = disable(forward, recursive=False)
        return disabled


def _of_class(layer: Any) -> Callable[..., Any]:
    """The layer's own forward, looked up when called: FSDP gives a layer a class of its own, and from
    transformers 5.23 on activation checkpointing is in the forward of the outermost class only."""

    @functools.wraps(layer.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return type(layer).forward(layer, *args, **kwargs)

    return forward


def sliced(value: Any, chosen: Tensor, rows: int) -> Any:
    """Cut every per-sample tensor of a layer's arguments to the chosen rows.

    Per sample is what has two or more dimensions and `rows` as its first size: masks, position ids, rotary
    tables. A first size of 1 is shared by all rows.

    Raises: UserError for the block masks of flex attention, which cannot be cut.
    """
    if rows == 1:
        return value
    if isinstance(value, torch.Tensor):
        return value.index_select(0, chosen) if value.dim() > 1 and value.shape[0] == rows else value
    if isinstance(value, dict):
        return {key: item if key in _WHOLE else sliced(item, chosen, rows) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(sliced(item, chosen, rows) for item in value)
    if type(value).__name__ == "BlockMask":
        raise UserError("layer dropout cannot slice flex attention's masks", 'use attn_implementation="sdpa"')
    return value
