"""What drafting costs where it does not pay: the prompts on which copies gain least, measured.

    python benchmarks/worst.py --data DATA --model smollm2-135m-base --threads 2 --save

Every prompt of the kinds of sources.py is decoded plainly, and the rounds of the default are worked out from its
output without the model. The --limit prompts with fewest tokens per round are then decoded by plain decoding and by
the default in turn, --trials times.
"""

from __future__ import annotations

import sys

import numpy as np
import record
import torch
from kinds import KINDS, chosen
from sources import AR, methods_of

import layerskip
from layerskip.decode.load import resolve_device
from layerskip.decode.options import Options
from layerskip.measure.exits.continuations import Continuation
from layerskip.measure.exits.sources import replay_sources
from layerskip.measure.intervals import ratio_of_sums
from layerskip.measure.results import named

POOL = 20  # prompts of a kind to choose from


def main() -> None:
    parser = record.comparison(__doc__, ",".join(KINDS))
    parser.add_argument("--limit", type=int, default=12, help="prompts that are measured")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--trials", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    lm = layerskip.load(arguments.model, dtype=arguments.dtype, device=device)
    prompts = [
        lm.encode(text, chat=kind.chat and lm.has_template)
        for kind in chosen(arguments.tasks).values()
        for text in kind.prompts(arguments.data, POOL)
    ]
    budget, tried = arguments.max_new_tokens, []
    call = lm.call(Options(drafter="lookup", policy="fixed"))
    said = lm.each(prompts, mode="ar", max_new_tokens=budget)
    for place, (prompt, plain) in enumerate(zip(prompts, said, strict=True)):
        print(f"plain: prompt {place + 1} of {len(prompts)}", file=sys.stderr, flush=True)
        if len(plain.tokens) == budget:  # short answers gain or lose little either way
            found = Continuation(prompt, plain.tokens, ended=False)
            rounds = replay_sources(found, call.controller(), {}, lambda *_: 1.0, budget, call.eos)
            tried.append((rounds.tokens_per_round, prompt))
    worst = sorted(tried)[: arguments.limit]
    methods = methods_of(lm, [AR, "default"], (), 0.0)
    seconds = np.zeros((2, len(worst)))
    for trial in range(arguments.trials):
        for place, (_, prompt) in enumerate(worst):
            outputs = {}
            for turn in range(2):
                at = (turn + trial + place) % 2
                name = [AR, "default"][at]
                run = methods[name].decode(place, prompt, budget)
                seconds[at, place] += run.decode_s
                outputs[name] = run.tokens
            if outputs["default"] != outputs[AR]:
                raise SystemExit(f"not lossless: prompt {place + 1}")
    ratio = ratio_of_sums(*seconds)
    result = {
        "speedup": ratio.record(),
        "tokens_per_round": [tokens for tokens, _ in worst],
        "tried": len(tried),
        "of_all": float(np.mean([tokens for tokens, _ in tried])),
        "configuration": record.configuration(arguments, device),
    }
    print(
        f"{ratio.ratio:.3f} x [{ratio.low:.3f}, {ratio.high:.3f}] on the {len(worst)} of {len(tried)} prompts with "
        f"fewest tokens per round, {worst[0][0]:.2f} to {worst[-1][0]:.2f} predicted (all: {result['of_all']:.2f})"
    )
    if arguments.save:
        dtype = str(lm.stack.dtype).removeprefix("torch.")
        record.save(result, "worst", arguments.name or named(arguments.model), dtype, device.type)


if __name__ == "__main__":
    record.run(main)
