"""Proof at load that a stack reproduces the model: its logits on a few tokens, whole and sliced."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from layerskip.errors import UserError
from layerskip.model.families import ADDING_A_MODEL
from layerskip.model.step import Step

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.model.stack import Stack

# Largest relative difference between our slices and the model's own forward that rounding explains: the same
# modules run, only the attention kernel may differ (masked against causal, other tiles). In float64 too some of
# Hugging Face's own steps (rotary tables, RMS norms, the eager softmax) are done in float32.
PARITY = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
OTHER_KERNELS = 5  # times as much at the median position, in 16 bit


def probe_tokens(vocab_size: int, device: torch.device, length: int = 8) -> Tensor:
    """Make a prompt that hits no special pattern: [1, length]."""
    return ((torch.arange(length, device=device) * 7919 + 11) % vocab_size)[None]


def check_slices(stack: Stack, tokens: Tensor, reference: Tensor, middle_within: float | None = None) -> None:
    """Compare a stack's logits for tokens [1, n] with a reference [1, n, V]: whole, then sliced and cached.

    Every position has to agree as `PARITY` says. With other kernels in 16 bit, or rounded weights, each step rounds
    otherwise, and a prompt of random tokens amplifies that at some positions: `middle_within` is the relative
    difference that the median position may then have.

    Raises: UserError when they differ beyond rounding.
    """
    middle, length = max(1, stack.num_layers // 2), tokens.shape[1]
    reference = reference.to(stack.device, torch.float32)
    prefill, plain, verification = (0, length - 3), (length - 3, 1), (length - 2, 2)
    for what, chunks in (
        ("its layers one by one", [(0, length)]),
        ("its layers sliced and cached", [prefill, plain, verification]),
    ):
        cache, logits = stack.new_cache(1, length), []
        for start, count in chunks:
            step = Step.span([0], [start], [count], stack.device, spill=length)
            h, _ = stack.run(stack.embed(tokens[:, start : start + count], step), 0, middle, step, cache)
            h, _ = stack.run(h, middle, stack.num_layers, step, cache)
            logits.append(stack.logits(h))
        _compare(stack, torch.cat(logits, 1), reference, what, middle_within)


def _compare(stack: Stack, ours: Tensor, reference: Tensor, what: str, middle_within: float | None) -> None:
    scale = reference.abs().max().item()
    differences = (ours - reference).abs().amax(-1).flatten()  # [n]
    difference = (differences.max() if middle_within is None else differences.median()).item()
    difference = difference if ours.isfinite().all() else math.nan
    allowed = PARITY.get(stack.dtype, 1e-4) if middle_within is None else middle_within
    if not math.isfinite(scale):
        raise UserError(
            "the model gives NaN or infinite logits: its weights are damaged, or overflow in this dtype",
            "download it again, or try --dtype float32",
        )
    if not difference <= allowed * max(scale, 1e-6):  # also catches our own NaN
        raise UserError(
            f"model type {stack.model_type!r} fails the parity check: {what} give logits that differ "
            f"from the model's own by {difference:.3g} (their largest is {scale:.3g})",
            ADDING_A_MODEL,
        )
