"""What equality rests on: the same bits however many positions a call has, the same tokens in any company, twice.

Bits are judged where the stack promises them (`row_exact`); elsewhere the largest difference is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from layerskip.measure.proof.cases import Case, Clock, decoded
from layerskip.measure.proof.equality import (
    DIFFERS,
    HOLDS,
    NO_CLAIM,
    Equality,
    Finding,
    equality_promised,
    first_difference,
)
from layerskip.model.step import Step

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.decode.language_model import LanguageModel
    from layerskip.model.stack import Stack
    from layerskip.watch import Watch

WIDEST = 9  # positions of a call: a draft of eight and the token before it
POSITIONS = 40  # of each prompt
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 1}
Pair = tuple[str, list[list[int]], list[list[int]]]  # what, alone, and again


def bits(
    lm: LanguageModel, prompts: Sequence[list[int]], exit_layer: int, clock: Clock, watch: Watch
) -> Finding:
    """Compare logits of prompts read one position a call with those of 2 to 9 a call, sliced at the exit."""
    stack, done, positions, largest, place = lm.stack, 0, 0, 0.0, None
    for prompt in prompts:
        if (done and clock.over) or place is not None:
            break
        tokens = prompt[:POSITIONS]
        watch("bits of a position", done, len(prompts))
        alone = chunked(stack, tokens, 1, exit_layer)
        for width in range(2, WIDEST + 1):
            together = chunked(stack, tokens, width, exit_layer)
            if not torch.equal(alone, together):
                apart = (alone - together).abs().amax(-1)  # [T]
                largest = max(largest, float(apart.max() / alone.abs().max()))
                first = int(apart.gt(0).nonzero()[0, 0]) if apart.gt(0).any() else 0
                place = (done, first, width) if stack.row_exact else None
            if place is not None:
                break
        done, positions = done + 1, positions + len(tokens)
    scope = f"{positions} positions, 1 to {WIDEST} a call"
    numbers = {"prompts": done, "positions": positions, "row_exact": stack.row_exact, "largest": largest}
    cut = done < len(prompts)
    if not stack.row_exact:
        told = f"row-exactness is not promised here; the largest difference is {largest:.2g} of the largest logit"
        return Finding("bits of a position", NO_CLAIM, scope, told, numbers, cut=cut)
    if place is None:
        told = "a position's logits have the same bits, alone and beside others"
        return Finding("bits of a position", HOLDS, scope, told, numbers, cut=cut)
    number, first, width = place
    told = f"prompt {number + 1}: position {first + 1} has other bits in calls of {width}"
    failure = {"tokens": prompts[number][: first + 1], "positions_a_call": width}
    return Finding("bits of a position", DIFFERS, scope, told, numbers, failure, ["--only", "bits"])


@torch.inference_mode()
def chunked(stack: Stack, tokens: Sequence[int], width: int, exit_layer: int) -> Tensor:
    """Read tokens, `width` a call; more than one pass the exit as a verification does. Shapes: float32 [T, V]."""
    cache, logits, length = stack.new_cache(1, len(tokens)), [], len(tokens)
    for start in range(0, length, width):
        part = torch.tensor([tokens[start : start + width]], device=stack.device)  # [1, width]
        step = Step.span([0], [start], [part.shape[1]], stack.device, spill=length)
        h = stack.embed(part, step)
        for first, last in (
            ((0, exit_layer), (exit_layer, stack.num_layers)) if width > 1 else ((0, stack.num_layers),)
        ):
            h, _ = stack.run(h, first, last, step, cache)
        logits.append(stack.logits(h)[0])
    return torch.cat(logits)


def company(of: Equality, case: Case) -> Finding:
    """Compare what a prompt gives alone with what it gives in a batch: plainly, drafted, and drawn by a seed."""
    lm, prompts, budget, watch = of.lm, of.prompts, of.budget, of.watch
    few = prompts[: case.rows]
    watch("rows beside", 0, 3)
    pairs = [
        ("plain", [of.plain(i) for i in range(len(prompts))], decoded(lm, prompts, budget, rows=len(prompts)))
    ]
    watch("rows beside", 1, 3)
    pairs.append(("drafted", [of.plain(i) for i in range(len(few))], decoded(lm, few, budget, case)))
    watch("rows beside", 2, 3)
    drawn = [decoded(lm, [prompt], budget, case, indices=[i], **SAMPLED)[0] for i, prompt in enumerate(few)]
    pairs.append(("drawn", drawn, decoded(lm, few, budget, case, **SAMPLED)))
    return _compared(lm, "rows beside", pairs, "a row's tokens do not depend on the rows beside it")


def twice(of: Equality, case: Case) -> Finding:
    """Decode twice with one seed: greedily and by sampling, plainly and drafted."""
    lm, prompt = of.lm, of.prompts[0]
    pairs: list[Pair] = []
    how: Case | None
    for name, how, sampling in (
        ("plain", None, {}),
        ("drafted", case, {}),
        ("drawn", None, SAMPLED),
        ("drawn from drafts", case, SAMPLED),
    ):
        of.watch("the same twice", len(pairs), 4)
        first, again = (decoded(lm, [prompt], of.budget, how, **sampling) for _ in range(2))
        pairs.append((name, first, again))
    return _compared(lm, "the same twice", pairs, "one seed, one output", always=True)


def _compared(
    lm: LanguageModel,
    check: str,
    pairs: Sequence[Pair],
    holds: str,
    always: bool = False,
) -> Finding:
    """Judge pairs of outputs; unless it holds `always`, only where the arithmetic promises it."""
    differing: list[dict[str, Any]] = [
        {"what": what, "prompt": index, "position": first_difference(a, b), "alone": a, "again": b}
        for what, left, right in pairs
        for index, (a, b) in enumerate(zip(left, right, strict=True))
        if a != b
    ]
    count = sum(len(left) for _, left, _ in pairs)
    numbers = {"outputs": count, "differing": len(differing)}
    scope = f"{count} outputs: {', '.join(what for what, *_ in pairs)}"
    if not differing:
        return Finding(check, HOLDS, scope, holds, numbers)
    one = differing[0]
    told = (
        f"{len(differing)} of {count} differ, the first ({one['what']}) from token {one['position'] + 1} on"
    )
    if not (always or equality_promised(lm)):
        return Finding(check, NO_CLAIM, scope, f"{told}; not promised in this dtype", numbers)
    return Finding(check, DIFFERS, scope, told, numbers, one, ["--only", check.split()[-1]])
