"""How long the parts of a round take on this machine, for the cost model.

The parts are the passes a round is made of, run eagerly on a real cache at a representative context; each includes
building its `Step` and reading the result on the host, as a round does. They are timed in turn, medians taken.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from layerskip.measure.speed.card import synchronise
from layerskip.model.cost import Cost
from layerskip.model.native.stack import NativeStack
from layerskip.model.step import Step

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.model.cache import Cache
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack

REPEATS = 9


class Workbench:
    """A cache filled with a context, on which the parts of a round can run again and again."""

    @torch.inference_mode()
    def __init__(self, stack: Stack, context: Sequence[int], draft_length: int) -> None:
        self.stack = stack
        self.token = torch.tensor([[context[-1]]], device=stack.device)  # [1, 1]
        self.start, self.width = len(context) - 1, draft_length + 1
        self.cache: Cache = stack.new_cache(1, self.start + self.width)
        if self.start:
            prompt = torch.tensor([list(context[:-1])], device=stack.device)
            self._through(prompt, self._step(0, self.start), stack.num_layers)
        h = self.passed(stack.num_layers)
        self.hidden = h  # [1, 1, D]
        self.wide = h.expand(1, self.width, -1).contiguous()  # [1, K+1, D]

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        slots = self.cache.keys[0].shape[2]
        return self.cache.num_bytes // slots

    def _step(self, start: int, count: int) -> Step:
        return Step.span([0], [start], [count], self.stack.device, spill=self.cache.capacity)

    def _through(self, tokens: Tensor, step: Step, depth: int) -> Tensor:
        return self.stack.run(self.stack.embed(tokens, step), 0, depth, step, self.cache)[0]

    def passed(self, depth: int) -> Tensor:
        """Run one token through the first `depth` layers."""
        return self._through(self.token, self._step(self.start, 1), depth)

    def drafted(self, exit_layer: int, head: Head | None) -> None:
        """Draft K tokens and make the last early pass, as a round does."""
        for _ in range(self.width - 1):
            self.headed(self.passed(exit_layer), head)
        self.passed(exit_layer)

    def verified(self, exit_layer: int) -> Tensor:
        """Run K+1 positions through the layers above the exit."""
        step = self._step(self.start, self.width)
        return self.stack.run(self.wide, exit_layer, self.stack.num_layers, step, self.cache)[0]

    def headed(self, hidden: Tensor, head: Head | None = None) -> list[int]:
        """Read the most probable tokens of one or several positions, through the head's adapter if it has one."""
        states = hidden[0]
        if head is not None and head.adapter is not None:
            states = head.adapter(states, self.stack.finished(states))
        best = self.stack.logits(states, head).argmax(-1)
        tokens: list[int] = (best if head is None else head.ids[best]).tolist()
        return tokens


@torch.inference_mode()
def timed(
    parts: Mapping[str, Callable[[], object]], device: torch.device, repeats: int = REPEATS
) -> dict[str, float]:
    """Median seconds of each part; the parts take turns, and a first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats + 1):
        for name, part in parts.items():
            synchronise(device)
            began = time.perf_counter()
            part()
            synchronise(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def step_cost(bench: Workbench, exit_layer: int, draft_head: Head | None, repeats: int = REPEATS) -> Cost:
    """Measure what the cost model wants, in seconds.

    The early passes are timed as a round makes them, one after the other: the same few layers stay in the caches.
    """
    parts: dict[str, Callable[[], object]] = {
        "layers": lambda: bench.passed(bench.stack.num_layers),
        "drafting": lambda: bench.drafted(exit_layer, draft_head),
        "head": lambda: bench.headed(bench.hidden),
        "draft_head": lambda: bench.headed(bench.hidden, draft_head),
        "verify": lambda: bench.verified(exit_layer),
        "verify_head": lambda: bench.headed(bench.wide),
    }
    seconds = timed(parts, bench.stack.device, repeats)
    drafts = bench.width - 1
    early = (seconds.pop("drafting") - drafts * seconds["draft_head"]) / bench.width
    return Cost(early=early, **seconds)


def plain_step(bench: Workbench, repeats: int = REPEATS) -> dict[str, float | None]:
    """Time a whole plain step, and the matrix products in it alone, in turn.

    `products_s` is None for a stack that cannot run its products apart.
    """
    stack = bench.stack
    parts: dict[str, Callable[[], object]] = {
        "step_s": lambda: bench.headed(bench.passed(stack.num_layers)),
    }
    if isinstance(stack, NativeStack):
        parts["products_s"] = stack.products
    seconds = timed(parts, stack.device, 2 * repeats)
    products = seconds.get("products_s")
    return {
        "step_s": seconds["step_s"],
        "products_s": products,
        "ratio": products and seconds["step_s"] / products,
    }


def head_times(bench: Workbench, heads: dict[int, Head | None], repeats: int = REPEATS) -> dict[int, float]:
    """Median seconds of drafting heads by their size; None is the full head."""
    parts = {str(size): partial(bench.headed, bench.hidden, head) for size, head in heads.items()}
    return {int(name): seconds for name, seconds in timed(parts, bench.stack.device, repeats).items()}
