"""Several layers in one call, see `layers.h`.

    slices = Slices.of(layers, attention, kernels)      # None where they cannot be
    h = slices(h, range(0, 12), step, cache)

A layer is four products and three regions between them; called one by one each of them costs what Python, an
allocation and the start of threads cost.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from layerskip.model.native.kernels import LaidLayer
from layerskip.model.native.tiles import Tiled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from layerskip.model.cache import Cache
    from layerskip.model.native.attention import Attention
    from layerskip.model.native.kernels import Kernels
    from layerskip.model.native.layer import Layer, Norm
    from layerskip.model.step import Step


class Slices:
    """Layers whose products are all of one format.

    Exact: the bits are those of the same layers called one by one (tests/model/test_slices.py).
    """

    def __init__(self, kernel: str, layers: Sequence[Layer], attention: Attention, kernels: Kernels) -> None:
        self._kernel, self._attention, self._kernels = kernel, attention, kernels
        self._laid = (LaidLayer * len(layers))(*map(_laid, layers))
        self._held = layers  # what `_laid` points to

    @classmethod
    def of(cls, layers: Sequence[Layer], attention: Attention, kernels: Kernels | None) -> Slices | None:
        """Put layers together, those whose gate is SiLU; None where part of them is not compiled."""
        linears = [linear for layer in layers for linear in layer.linears]
        names = {linear.kernel if isinstance(linear, Tiled) else "" for linear in linears}
        gains = [norm.gain.dtype for layer in layers for norm in _norms(layer) if norm is not None]
        if kernels is None or len(names) != 1 or names == {""} or {*gains} != {torch.bfloat16}:
            return None
        return cls(names.pop(), layers, attention, kernels)

    def __call__(self, h: Tensor, layers: range, step: Step, cache: Cache) -> Tensor:
        """Shapes: h [B, T, D] -> [B, T, D], T at most `MOST_COMPILED`; the cache is written as by `Stack.run`."""
        own = self._attention
        laid = (LaidLayer * len(layers)).from_buffer(self._laid, layers.start * ctypes.sizeof(LaidLayer))
        turns = any(self._held[layer].rotary for layer in layers)
        angles = own.angles(step, cache.capacity) if turns else None
        return self._kernels.layers(self._kernel, laid, h, own.heads, own.scale, angles, cache, layers, step)


def _norms(layer: Layer) -> tuple[Norm | None, ...]:
    return layer.before_attention, layer.q_norm, layer.k_norm, layer.before_mlp


def _laid(layer: Layer) -> LaidLayer:
    norms = _norms(layer)
    gains = [None if norm is None else norm.gain.data_ptr() for norm in norms]
    eps = [0.0 if norm is None else norm.eps for norm in norms]
    products = [linear.laid for linear in layer.linears if isinstance(linear, Tiled)]
    return LaidLayer(*products, *gains, tuple(eps), layer.window or 0, layer.rotary)
