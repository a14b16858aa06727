"""What a pass over several positions costs beside one over a single position, by length of context.

    python benchmarks/attention.py --threads 2 --save
    python benchmarks/attention.py --contexts 128 --widths 1,6 --turns 3     # a rehearsal, seconds

A round verifies K drafts in one pass over K + 1 positions, and its gain ends where that pass costs as much as K + 1
steps. Products read each weight once however many positions there are; attention can read each key once too, so
the ratio should hardly grow with the context. A pass is embedding, all layers and the head over every position, at
the end of a cache filled with random keys and values (what they hold costs no time). All cases take turns in a
shuffled order and ratios are taken within a turn; printed are medians with a bootstrap interval, and the least time
of each case. Equality comes first: a pass over several positions must give the bits of single steps.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from typing import Any

import record
import torch

import layerskip
from layerskip.measure.intervals import interval
from layerskip.model.step import Step


def passes(stack: Any, contexts: list[int], widths: list[int]) -> dict[tuple[int, int], Any]:
    """Make one function per context and width: each runs a pass and returns its logits [1, T, V]."""
    capacity = max(contexts) + max(widths)
    cache = stack.new_cache(1, capacity)
    generator = torch.Generator().manual_seed(0)
    for store in (*cache.keys, *cache.values):
        store.copy_(torch.randn(store.shape, generator=generator))
    tokens = torch.randint(stack.vocab_size, (1, capacity), generator=generator)

    def made(start: int, width: int) -> Any:
        def run() -> torch.Tensor:
            step = Step.span([0], [start], [width], stack.device, spill=capacity)
            with torch.inference_mode():
                h = stack.embed(tokens[:, start : start + width], step)
                return stack.logits(stack.run(h, 0, stack.num_layers, step, cache)[0])

        return run

    for context in contexts:  # before any time is taken
        alone = torch.cat([made(context + t, 1)() for t in range(max(widths))], 1)
        for width in widths:
            if not torch.equal(made(context, width)(), alone[:, :width]):
                raise SystemExit(f"{width} positions behind {context} differ from single steps")
    print(f"the bits of single steps: {len(contexts)} contexts, {len(widths)} widths")
    return {(context, width): made(context, width) for context in contexts for width in widths}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-base")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--contexts", default="128,1024,4096", help="tokens in the cache, comma-separated")
    parser.add_argument("--widths", default="1,2,4,6,8,12,16,32", help="positions of a pass, comma-separated")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/attention_*.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    contexts, widths = (
        sorted({first, *map(int, given.split(","))})
        for given, first in ((arguments.contexts, 128), (arguments.widths, 1))
    )
    lm = layerskip.load(arguments.model, dtype=arguments.dtype, device="cpu", stack="native")
    cases = passes(lm.stack, contexts, widths)
    seconds: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    order, shuffled = list(cases), random.Random(0)
    for _ in range(arguments.turns):
        shuffled.shuffle(order)
        for case in order:
            began = time.perf_counter()
            cases[case]()
            seconds[case].append(time.perf_counter() - began)
    result = {
        "passes": [
            {
                "context": context,
                "positions": width,
                "least_s": min(own),
                "of_one_position": over(own, seconds[context, 1]),
                "of_context_128": over(own, seconds[128, width]),
            }
            for (context, width), own in seconds.items()
        ],
        "configuration": record.configuration(arguments, lm.stack.device),
    }
    print(f"{'context':>8}{'positions':>11}{'least ms':>10}{'of one position':>25}{'of context 128':>25}")
    for found in result["passes"]:
        ratios = "".join(
            f"{one['median']:>10.3f} [{one['ci95'][0]:.3f}, {one['ci95'][1]:.3f}]".rjust(25)
            for one in (found["of_one_position"], found["of_context_128"])
        )
        print(f"{found['context']:>8}{found['positions']:>11}{1e3 * found['least_s']:>10.2f}{ratios}")
    if arguments.save:
        record.save(result, "attention", arguments.model, arguments.dtype, "cpu")


def over(own: list[float], other: list[float]) -> dict[str, Any]:
    """Take the ratio within each turn: its median and 95% interval, and that of the least times."""
    found = interval([[a / b for a, b in zip(own, other, strict=True)]])
    return {**found.record(), "of_least": min(own) / min(other)}


if __name__ == "__main__":
    main()
