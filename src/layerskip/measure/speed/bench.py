"""Fair timing: equality first, then the methods interleaved within trials, ratios within a trial, intervals.

    settings = Settings(exit_layer=6, draft_length=4, max_new_tokens=64)
    result = bench(lm, prompts, settings)      # one object, as `layerskip bench --json` prints it

Nothing is timed before all methods have decoded all prompts once: that pass compares the outputs, measures the
memory and warms up. In float32 and float64 a self-speculative output that differs from plain decoding ends the
measurement (`NotLossless`); in 16 bit the count is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from layerskip.decode.generation import by_source
from layerskip.decode.weight_formats import kept
from layerskip.errors import UserError
from layerskip.measure.exits.replay import by_place
from layerskip.measure.intervals import interval, ratios
from layerskip.measure.speed import methods as ways
from layerskip.measure.speed.card import Card, card
from layerskip.measure.speed.draft_sizes import chosen_vocabulary
from layerskip.measure.speed.memory import growth
from layerskip.measure.speed.methods import (
    AR,
    EARLY_EXIT,
    HF,
    HF_EARLY_EXIT,
    SELF_SPECULATIVE,
    Method,
    Run,
)
from layerskip.measure.speed.steps import Workbench, plain_step, step_cost
from layerskip.model.native.attention import MOST_EXACT_ROWS
from layerskip.watch import Watch, silent

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel
    from layerskip.decode.options import Plan
    from layerskip.decode.request import Round
    from layerskip.measure.speed.settings import Prompt, Settings

WARM_UP = 32  # new tokens of the calls before: room for full-length drafts
PAIRS = (  # compared besides every method over ar
    (AR, HF),
    (SELF_SPECULATIVE, HF),
    (SELF_SPECULATIVE, HF_EARLY_EXIT),
    (HF_EARLY_EXIT, HF),
)


class NotLossless(Exception):  # noqa: N818 - it names what was found
    """Self-speculation gave other tokens than plain decoding where it must not: no speed is worth printing."""


def bench(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    settings: Settings,
    announce: Callable[[Card], None] = lambda card: None,
    watch: Watch = silent,
) -> dict[str, Any]:
    """Measure; returns the result without its `configuration`. `announce` gets the card before anything is timed.

    Raises: UserError for what cannot be measured, NotLossless.
    """
    check(lm, prompts, settings)
    plan = lm.plan(settings.options())
    longest = max(plan.draft_length, plan.copying.longest if plan.copying else 0)
    table, context = _workbench(lm, prompts, settings.max_new_tokens, plan.draft_length)
    cost = {row.name: row.perplexity_cost for row in kept(lm.path) or ()}.get(settings.quantisation)
    facts = card(lm.stack, context, table.token_bytes, settings.quantisation, cost)
    announce(facts)
    plain = ways.ours(lm, AR, facts.weight_bytes)
    first = _Pass(plain, prompts, settings.max_new_tokens, lm.stack.device, watch)
    vocab = chosen_vocabulary(lm, prompts, settings, plan, table, [run.tokens for run in first.runs])
    drafting = _contestants(lm, settings, plan, facts, vocab)
    passes = [
        first,
        *(_Pass(m, prompts, settings.max_new_tokens, lm.stack.device, watch) for m in drafting),
    ]
    if settings.simulate_acceptance is None:
        require_equality(lm.stack.dtype, lm.stack.row_exact and longest < MOST_EXACT_ROWS, passes)
    head = lm.draft_head(settings.options(draft_vocab=vocab))
    step = plain_step(table)
    timed = _trials([one.method for one in passes], prompts, settings, watch)
    result = summed(passes, timed, prompts, settings, plan)
    own = result["methods"].get(SELF_SPECULATIVE)
    for name in {HF, HF_EARLY_EXIT} & set(result["methods"]):
        result["methods"][name]["dtype"] = _name(settings.hf_dtype or lm.stack.dtype)
    result = {"card": facts.as_record(), **result}
    result["methods"][AR]["roofline_share"] = (
        result["methods"][AR]["decode_tokens_per_s"] / facts.roofline_tokens_per_s
    )
    result["methods"][AR]["step"] = step
    fixed = own and plan.draft_length and not plan.controlled and not plan.confidence
    result["predicted_speedup"] = (  # the cost model knows one E and K
        step_cost(table, plan.exit_layer, head).speedup(plan.draft_length, own["tokens_per_round"])
        if fixed
        else None
    )
    if own:
        own |= {
            "drafter": plan.drafter,
            "exit_layer": plan.exit_layer,
            "draft_length": plan.draft_length,
            "match_min": plan.copying.shortest if plan.copying else None,
            "copy_length": plan.copying.longest if plan.copying else None,
            "policy": plan.policy,
            "confidence": plan.confidence or None,
            "guard": plan.guard,
            "draft_vocab": "off" if head is None else head.size,
        }
    return result


def check(lm: LanguageModel, prompts: Sequence[Prompt], settings: Settings) -> None:
    """Refuse what cannot be measured, before any work. Raises: UserError."""
    if settings.max_new_tokens < 2:
        raise UserError(
            f"max_new_tokens is {settings.max_new_tokens}", "a decode rate needs at least two tokens"
        )
    if settings.trials < 1:
        raise UserError(f"trials is {settings.trials}", "one trial is the least")
    if settings.simulate_acceptance is not None and SELF_SPECULATIVE not in settings.methods:
        raise UserError("an acceptance can be simulated for self-speculation only", "add it to --methods")
    if HF_EARLY_EXIT in settings.methods and lm.plan(settings.options()).draft_length == 0:
        raise UserError(
            "Hugging Face drafts at least one token", f"give a draft length, or drop {HF_EARLY_EXIT}"
        )
    if (
        HF_EARLY_EXIT in settings.methods
        and settings.max_new_tokens < lm.plan(settings.options()).draft_length + 2
    ):
        raise UserError(
            f"max_new_tokens is {settings.max_new_tokens}: Hugging Face may write that many in its first round",
            "a decode rate needs two rounds: raise it, or lower the draft length",
        )
    if isinstance(settings.draft_vocab, int):
        lm.draft_head(settings.options(draft_vocab=settings.draft_vocab))  # refuses a size out of range
    if not prompts:
        raise UserError("there are no prompts to measure with", "give --limit 1 or more")
    context = lm.stack.context
    for index, prompt in enumerate(prompts):
        if context is not None and len(prompt.tokens) + settings.max_new_tokens > context:
            raise UserError(
                f"prompt {index + 1} has {len(prompt.tokens)} tokens; with {settings.max_new_tokens} new ones it "
                f"passes the context of {context}",
                "lower --max-new-tokens, or shorten the prompt: every method must make all tokens",
            )


def _workbench(
    lm: LanguageModel, prompts: Sequence[Prompt], budget: int, draft_length: int
) -> tuple[Workbench, int]:
    """Fill a cache to the middle of a typical continuation."""
    median = statistics.median_low(len(prompt.tokens) for prompt in prompts)
    length = median + budget // 2
    source = next(prompt.tokens for prompt in prompts if len(prompt.tokens) == median)
    context = (source * (length // len(source) + 1))[:length]
    return Workbench(lm.stack, context, draft_length), length


def _contestants(
    lm: LanguageModel, settings: Settings, plan: Plan, facts: Card, vocab: int | str
) -> list[Method]:
    """Build the methods besides plain decoding."""
    made: dict[str, Method] = {}
    head = lm.draft_head(settings.options(draft_vocab=vocab))
    extra = 0 if head is None else head.num_bytes
    if SELF_SPECULATIVE in settings.methods:
        made[SELF_SPECULATIVE] = ways.ours(
            lm,
            SELF_SPECULATIVE,
            facts.weight_bytes + extra,
            draft_vocab=vocab,
            simulate_acceptance=settings.simulate_acceptance,
            **{name: value for name, value in plan.keywords.items() if name != "mode"},
        )
    if EARLY_EXIT in settings.methods:
        made[EARLY_EXIT] = ways.ours(lm, EARLY_EXIT, facts.weight_bytes, exit_layer=settings.exit_layer)
    if {HF, HF_EARLY_EXIT} & set(settings.methods):
        hf = ways.hugging_face_model(lm, settings.hf_dtype or lm.stack.dtype)
        made[HF] = ways.hugging_face(hf)
        made[HF_EARLY_EXIT] = ways.hugging_face(hf, plan.exit_layer, plan.draft_length)
    return [made[name] for name in settings.methods if name != AR]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Pass:
    """One method over all prompts, untimed: outputs, memory, and what a first call costs more than a second."""

    def __init__(
        self, method: Method, prompts: Sequence[Prompt], budget: int, device: torch.device, watch: Watch
    ) -> None:
        self.method = method
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            method.decode(0, prompts[0].tokens, min(budget, WARM_UP))
            seconds.append(time.perf_counter() - began)
        self.setup_s = max(0.0, seconds[0] - seconds[1])
        self.runs: list[Run] = []
        with growth(device) as grown:
            for index, prompt in enumerate(prompts):
                watch(f"equality: {method.name}", index, len(prompts))
                self.runs.append(method.decode(index, prompt.tokens, budget))
                made = len(self.runs[-1].tokens)
                if made != budget:
                    raise UserError(
                        f"{method.name} made {made} of {budget} tokens for prompt {index + 1}",
                        "methods can be compared over the same number of tokens only",
                    )
        watch(f"equality: {method.name}", len(prompts), len(prompts))
        self.peak_bytes = None if grown.num_bytes is None else method.tensor_bytes + grown.num_bytes


def require_equality(dtype: torch.dtype, row_exact: bool, passes: Sequence[_Pass]) -> None:
    """Raise NotLossless when exact arithmetic was promised and self-speculation gave other tokens."""
    if not (row_exact or dtype in (torch.float32, torch.float64)):
        return
    plain = passes[0]
    for other in passes[1:]:
        if other.method.name == SELF_SPECULATIVE and (found := divergences(plain.runs, other.runs)):
            first = found[0]
            raise NotLossless(
                f"{len(found)} of {len(plain.runs)} self-speculative outputs differ in {_name(dtype)}; "
                f"prompt {first['prompt'] + 1} first at token {first['position']}"
            )


def divergences(plain: Sequence[Run], others: Sequence[Run]) -> list[dict[str, int]]:
    """Find where outputs first differ: prompt and position, both counted from 0."""
    found = []
    for index, (a, b) in enumerate(zip(plain, others, strict=True)):
        at = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), None)
        if at is not None:
            found.append({"prompt": index, "position": at})
    return found


def schedule(num_trials: int, num_prompts: int, num_methods: int) -> Iterator[tuple[int, int, int]]:
    """Order the timed work: (trial, prompt, method). On each prompt the methods take turns, led in rotation."""
    for trial in range(num_trials):
        for prompt in range(num_prompts):
            for turn in range(num_methods):
                yield trial, prompt, (turn + trial + prompt) % num_methods


def _trials(
    methods: Sequence[Method], prompts: Sequence[Prompt], settings: Settings, watch: Watch
) -> list[list[list[Run]]]:
    """Time all methods; the runs of [method][prompt], one per trial."""
    timed: list[list[list[Run]]] = [[[] for _ in prompts] for _ in methods]
    total = settings.trials * len(prompts) * len(methods)
    for done, (_, prompt, method) in enumerate(schedule(settings.trials, len(prompts), len(methods))):
        watch(f"timing: {methods[method].name}", done, total)
        run = methods[method].decode(prompt, prompts[prompt].tokens, settings.max_new_tokens)
        timed[method][prompt].append(run)
    watch("timing", total, total)
    return timed


def summed(
    passes: Sequence[_Pass],
    timed: Sequence[Sequence[Sequence[Run]]],
    prompts: Sequence[Prompt],
    settings: Settings,
    plan: Plan,
) -> dict[str, Any]:
    """Put the runs together: methods, speed-ups, per prompt."""
    simulated = settings.simulate_acceptance
    speeds = {
        one.method.name: [[run.decode_tokens_per_s for run in runs] for runs in timed[i]]
        for i, one in enumerate(passes)
    }
    methods: dict[str, dict[str, Any]] = {}
    per_prompt: list[dict[str, Any]] = [{"index": i, "task": p.task} for i, p in enumerate(prompts)]
    for i, one in enumerate(passes):
        name = one.method.name
        made_up = simulated is not None and name == SELF_SPECULATIVE
        found = divergences(passes[0].runs, one.runs)
        rate = interval(speeds[name])
        prefills = [
            len(prompt.tokens) / run.prefill_s
            for prompt, runs in zip(prompts, timed[i], strict=True)
            for run in runs
        ]
        rounds = [round for run in one.runs for round in run.rounds if round.source != "prefill"]
        kept, drafted = sum(r.accepted for r in rounds), sum(r.drafted for r in rounds)
        arrivals = sum(len(run.arrivals) - 1 for run in one.runs)
        methods[name] = {
            "decode_tokens_per_s": rate.median,
            "ci95": rate.ci95,
            "prefill_tokens_per_s": statistics.median(prefills),
            "tokens_per_round": sum(run.decode_tokens for run in one.runs) / arrivals,
            "acceptance": kept / drafted if drafted else None,
            "by_source": by_source(rounds),
            "plain_rounds": sum(not r.draft for r in rounds),
            "acceptance_by_position": by_position(rounds, max(len(r.draft) for r in rounds))
            if drafted
            else None,
            "peak_bytes": one.peak_bytes,
            "setup_s": one.setup_s,
            "equal_to_ar": None if made_up else not found,
            "equal_outputs": None if made_up else len(prompts) - len(found),
            "of": len(prompts),
            "first_divergences": None if made_up else found,
        }
        if made_up:
            methods[name]["simulated"] = simulated
        differing = {d["prompt"] for d in found}
        for index, line in enumerate(per_prompt):
            own = [r for r in one.runs[index].rounds if r.source != "prefill"]
            drafted = sum(r.drafted for r in own)
            line[name] = {
                "decode_tokens_per_s": statistics.median(speeds[name][index]),
                "acceptance": sum(r.accepted for r in own) / drafted if drafted else None,
                "equal_to_ar": None if made_up else index not in differing,
            }
    pairs = [(name, AR) for name in speeds if name != AR]
    pairs += [pair for pair in PAIRS if set(pair) <= set(speeds)]
    ratio = {f"{a}/{b}": interval(ratios(speeds[a], speeds[b])) for a, b in pairs}
    return {
        "methods": methods,
        "speedup": {name: r.record() for name, r in ratio.items()},
        "predicted_speedup": None,
        "per_prompt": per_prompt,
    }


def by_position(rounds: Sequence[Round], draft_length: int) -> list[float | None]:
    """Share of drafts kept at each place of a round, of those judged there; see `by_place`."""
    drafted, accepted = np.array([(round.drafted, round.accepted) for round in rounds]).reshape(-1, 2).T
    return by_place(drafted, accepted, draft_length)
