"""Sampling: the first tokens drawn from drafts obey the model's own law, and the test would see one that does not.

    found = sampled(lm, prompts, Case(2, 2), [Case(7, 2, on_device=True)], draws=768, clock=Clock(60), watch=watch)

The law of the first three new tokens is enumerated: top-k leaves k cells for each. Two wrong laws stand beside
it, those of the mistakes made most: drafts that are always kept, and a rejected draft that is drawn again from p
instead of from what is left of p. Both must be told apart by the same draws, else the test had no power.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from layerskip.decode.engine import Engine
from layerskip.decode.request import Failure
from layerskip.decode.sampling import Sampling, warp
from layerskip.measure.proof.cases import Case, Clock, prepared
from layerskip.measure.proof.equality import (
    CHUNK,
    DIFFERS,
    HOLDS,
    NO_POWER,
    Finding,
    equality_promised,
    logits_behind,
)

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.decode.language_model import LanguageModel
    from layerskip.watch import Watch

PASSES, POWER = 1e-4, 1e-4  # p-values: of the right law above, of a wrong one below
TOKENS = 3  # the first is the prompt's own, the second a draft or its correction, the third what follows
LAW = Sampling(temperature=0.8, top_k=4)
ROWS = 32
TRIED, LONGEST = 8, 64  # prompts, and their tokens
FEWEST, SURE = 256, 60  # draws; the chi-square of a wrong law that they are to reach
STRAY = (
    0.02  # of the draws outside the law's cells: where logits may differ by rounding, the k-th best is unsure
)
Law = dict[tuple[int, ...], float]


def sampled(
    lm: LanguageModel,
    prompts: Sequence[list[int]],
    usual: Case,
    others: Sequence[Case],
    draws: int,
    clock: Clock,
    watch: Watch,
) -> Finding:
    """Draw many first tokens with the usual case and one of the others; test them against exact and wrong laws.

    Prompt and other case are those that tell the wrong laws apart by the least work; `draws` is the most of a case.
    """
    watch("sampling: the law", 0, 0)
    tried = [prompt[:LONGEST] for prompt in prompts[:TRIED]]
    found = [(tells, prompt, case) for prompt in tried for case, tells in telling(lm, prompt, others).items()]
    layers = lm.stack.num_layers
    tells, prompt, other = max(found, key=lambda one: one[0] / (2 * layers + one[2].work))
    cases, draws = (usual, other), min(draws, max(FEWEST, int(SURE / max(tells, 1e-9))))
    p = exact_law(lm, prompt)
    told: list[str] = []
    numbers: list[dict[str, Any]] = []
    lost, failure = False, None
    for case in cases:
        if told and clock.over:
            break
        counts = drawn(lm, prompt, case, draws, clock, watch)
        total = sum(counts.values())
        outside = sum(count for tokens, count in counts.items() if tokens not in p)
        sure = equality_promised(lm) or outside > STRAY * total
        fair = _p(counts if sure else {t: n for t, n in counts.items() if t in p}, p)
        pairs = Counter[tuple[int, ...]]()
        for tokens, count in counts.items():
            pairs[tokens[:2]] += count
        wrong = {name: _p(pairs, law) for name, law in wrong_laws(lm, prompt, p, case).items()}
        seen = {**vars(case), "draws": total, "outside": outside, "p": fair, "wrong_laws": wrong}
        numbers.append(seen)
        told.append(
            f"E {case.exit_layer}: p = {fair:.2g}, {', '.join(f'{name} {x:.1g}' for name, x in wrong.items())}"
        )
        if fair <= PASSES:
            lost, failure = True, {"prompt": prompt, **seen}
            break
    laws = [one["wrong_laws"] for one in numbers]
    powerful = all(min(law[name] for law in laws) < POWER for name in laws[0])
    return Finding(
        "sampling, chi-square",
        DIFFERS if lost else HOLDS if powerful else NO_POWER,
        f"{len(numbers)} settings, {sum(one['draws'] for one in numbers):,} draws of {TOKENS} tokens",
        "; ".join(told)
        + ("" if powerful or lost else "; too few draws, or drafts too good, to tell a wrong law apart"),
        {"settings": numbers, "cells": len(p), "temperature": LAW.temperature, "top_k": LAW.top_k},
        failure,
        ["--only", "sampling"] if lost else [],
        cut=not lost and (len(numbers) < len(cases) or any(one["draws"] < draws for one in numbers)),
    )


def drawn(
    lm: LanguageModel, prompt: list[int], case: Case, draws: int, clock: Clock, watch: Watch
) -> Counter[tuple[int, ...]]:
    """Count the first tokens of many outputs, each with random numbers of its own.

    Rows are kept, so that their prompt is not run again. At least a batch is drawn, whatever the time.
    """
    call = prepared(lm, TOKENS + 1, case, temperature=LAW.temperature, top_k=LAW.top_k, eos_token_id=[])
    engine = Engine(
        lm.stack,
        rows=ROWS,
        capacity=len(prompt) + TOKENS,
        draft_head=call.head,
        prefill_chunk=CHUNK,
        device_rounds=case.on_device,
    )
    counts, rows = Counter[tuple[int, ...]](), list[int]()
    for first in range(0, draws, ROWS):
        if first and clock.over:
            break
        watch(f"sampling, E {case.exit_layer}", first, draws)
        made: dict[int, list[int]] = {}
        for place in range(ROWS):
            request = call.request(prompt, first + place, keep=True)
            row = engine.add(request, rows[place] if first else None)
            rows += [] if first else [row]
            made[row] = []
        while engine.busy:
            for event in engine.step():
                if isinstance(event, Failure):
                    raise event.error
                made[event.row] += event.tokens
                if len(made[event.row]) >= TOKENS:
                    engine.pause(event.row)
        counts.update(tuple(tokens[:TOKENS]) for tokens in made.values())
    return counts


# -- laws ----------------------------------------------------------------------------------------------------


def exact_law(lm: LanguageModel, prompt: list[int], length: int = TOKENS) -> Law:
    """Enumerate the law of the first new tokens by the model's own logits."""
    law: Law = {(): 1.0}
    for _ in range(length):
        begun = list(law)
        logits = logits_behind(lm.stack, [[*prompt, *tokens] for tokens in begun])  # [cells, V]
        law = {
            (*tokens, int(token)): law[tokens] * float(row[token])
            for tokens, row in zip(begun, warp(logits, LAW).double(), strict=True)
            for token in row.nonzero()[:, 0]
        }
    return law


def wrong_laws(lm: LanguageModel, prompt: list[int], p: Law, case: Case) -> dict[str, Law]:
    """The laws of the first two tokens if drafts were always kept, or rejected ones drawn again from p."""
    first: Law = {}
    second: dict[int, dict[int, float]] = {}
    for (one, two, *_), mass in p.items():
        first[one,] = first.get((one,), 0.0) + mass
        second.setdefault(one, {}).setdefault(two, 0.0)
        second[one][two] += mass
    begun = list(first)
    head = prepared(lm, TOKENS + 1, case).head
    states = logits_behind(lm.stack, [[*prompt, *tokens] for tokens in begun], case.exit_layer)  # [cells, D]
    with torch.inference_mode():
        logits = lm.stack.logits(states, head)
        logits = logits if head is None else head.scatter(logits, lm.stack.vocab_size)
        drafts: Tensor = warp(logits, LAW).double()  # [cells, V]
    laws: dict[str, Law] = {"always kept": {}, "drawn again from p": {}}
    for tokens, q in zip(begun, drafts, strict=True):
        own = torch.zeros_like(q)
        for token, mass in second[tokens[0]].items():
            own[token] = mass / first[tokens]
        common = torch.minimum(own, q)
        again = common + (1 - common.sum()) * own
        for name, law in (("always kept", q), ("drawn again from p", again)):
            laws[name] |= {(*tokens, int(t)): first[tokens] * float(law[t]) for t in law.nonzero()[:, 0]}
    return laws


def telling(lm: LanguageModel, prompt: list[int], cases: Sequence[Case]) -> dict[Case, float]:
    """Say how fast draws tell the nearer of the wrong laws from the exact one: chi-square per draw, by case."""
    p = exact_law(lm, prompt, 2)

    def distance(law: Law) -> float:
        return sum(
            (mass - law.get(cell, 0.0)) ** 2 / max(law.get(cell, 0.0), 0.01) for cell, mass in p.items()
        )

    return {case: min(map(distance, wrong_laws(lm, prompt, p, case).values())) for case in cases}


def _p(counts: Mapping[tuple[int, ...], int], law: Law) -> float:
    cells = sorted({*law, *counts})
    return p_value(
        torch.tensor([counts.get(cell, 0) for cell in cells]),
        torch.tensor([law.get(cell, 0.0) for cell in cells], dtype=torch.float64),
    )


def p_value(counts: Tensor, law: Tensor) -> float:
    """Pearson's test of counts against a law over the same cells; cells expected below 5 times are pooled."""
    expected = law.double().flatten() / law.double().sum() * counts.sum()
    counts = counts.double().flatten()
    if counts[expected == 0].sum() > 0:
        return 0.0  # the impossible happened
    expected, order = expected.sort()
    counts, smaller = counts[order], expected.cumsum(0) - expected
    rare = (expected < 5) | ((smaller > 0) & (smaller < 5))  # the pool itself reaches 5 too
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    return chi_square_tail(float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1)


def chi_square_tail(statistic: float, degrees: int) -> float:
    """Probability that chi-square exceeds the statistic: the upper regularised gamma function Q(k/2, x/2)."""
    half = torch.tensor([degrees, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(half[0], half[1])) if degrees else 1.0
