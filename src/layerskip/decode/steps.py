"""The three regions of decoding, as functions of (stack, cache, step): prefill, draft, verify.

These are the boundaries a compiler or a CUDA graph will capture; here is their eager form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.model.cache import Cache
    from layerskip.model.stack import Stack, Step


def prefill(stack: Stack, cache: Cache, tokens: Tensor, step: Step, depth: int) -> Tensor:
    """Run a chunk of the prompt through the first `depth` layers.

    Shapes: tokens [B, T] -> hidden states [B, T, D]. The head is left to the caller: one position needs it.
    """
    h, _ = stack.run(stack.embed(tokens, step), 0, depth, step, cache)
    return h


def draft(stack: Stack, cache: Cache, tokens: Tensor, step: Step, exit_layer: int) -> Tensor:
    """Run one token per row through the layers [0, E) and return what verification will continue from.

    Shapes: tokens [B, 1] -> hidden states [B, 1, D].
    """
    h, _ = stack.run(stack.embed(tokens, step), 0, exit_layer, step, cache)
    return h


def verify(stack: Stack, cache: Cache, hidden: Tensor, step: Step, exit_layer: int, depth: int) -> Tensor:
    """Run the kept hidden states of all positions through the layers [E, depth) in one call.

    Shapes: hidden [B, T, D] -> [B, T, D].
    """
    h, _ = stack.run(hidden, exit_layer, depth, step, cache)
    return h
