"""The verb bench: ways of decoding compared."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

from rich.text import Text

from layerskip.cli.app import AsJson, Loading, Model, Save, verb
from layerskip.cli.options import Given, default, only, without, worded
from layerskip.cli.prompts import PromptOptions, encoded
from layerskip.cli.results import configuration, loaded, progress, save_result
from layerskip.cli.show.bench import print_bench, print_card
from layerskip.cli.show.terminal import err, notes, out, tell
from layerskip.decode.options import DraftOptions, SamplingOptions, vocabulary_size
from layerskip.option import option


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how often."""

    draft_vocab: int | str | None = option(
        None, "Tokens the draft head knows: a number, auto (by the cost model) or off.", choices=("auto", "off"),
        typed=str | None, read=vocabulary_size, shown="by checkpoint",
    )  # fmt: skip
    hf_dtype: str | None = option(None, "Dtype of the hf methods.", shown="same as --dtype")
    methods: str = option(
        "ar,self-speculative,early-exit",
        "Any of ar, self-speculative, early-exit, hf, hf-early-exit; ar always is.",
    )
    trials: int = option(3, "Timed turns of every method on every prompt.", least=1)


@verb
def bench(
    model: Model,
    prompts: PromptOptions,
    comparison: Comparison,
    budget: Annotated[
        SamplingOptions,
        only("max_new_tokens"),
        default(max_new_tokens=64),
        worded("max_new_tokens", help="Every method makes exactly this many."),
    ],
    drafting: Annotated[DraftOptions, without("mode", "draft_vocab")],
    loading: Loading,
    given: Given,
    save: Save = False,
    as_json: AsJson = False,
) -> None:
    """Compare ways of decoding: equality first, methods interleaved, medians with intervals.

    layerskip bench smollm2-135m --exit-layer 2 --draft-length 2 --limit 4 --max-new-tokens 32
    """
    from layerskip.decode.load import resolve_device, resolve_dtype
    from layerskip.measure.speed import bench as benches
    from layerskip.measure.speed.methods import parsed
    from layerskip.measure.speed.settings import Prompt, Settings

    hf_dtype, simulated = comparison.hf_dtype, drafting.simulate_acceptance
    settings = Settings(
        methods=parsed(comparison.methods),
        exit_layer=drafting.exit_layer,
        draft_length=drafting.draft_length,
        draft_vocab=comparison.draft_vocab,
        max_new_tokens=budget.max_new_tokens,
        trials=comparison.trials,
        simulate_acceptance=simulated,
        hf_dtype=None if hf_dtype is None else resolve_dtype(hf_dtype, resolve_device(loading.device)),
        quantisation=loading.quantize,
        policy=drafting.policy,
        confidence=drafting.confidence,
        guard=drafting.guard,
        drafter=drafting.drafter,
        match_min=drafting.match_min,
        copy_length=drafting.copy_length,
    )
    settings.options(draft_vocab=settings.draft_vocab or "auto")
    lines = prompts.lines()
    lm, load_s = loaded(model, loading)
    items = [Prompt(line.task, encoded(lm, line.content)) for line in lines]
    try:
        with progress() as watch:
            result = benches.bench(
                lm,
                items,
                settings,
                announce=lambda card: print_card(notes if as_json else out, card),
                watch=watch,
            )
    except benches.NotLossless as error:
        err.print(Text(f"not lossless: {error}", style="bold red"))
        sys.exit(1)
    result["configuration"] = configuration(given, lm, load_s, **prompts.looked_at(len(items)))
    if simulated is not None:
        result["simulated"] = simulated
    tell(result, as_json, print_bench)
    if save:
        parts = [loading.quantize] if loading.quantize else []
        parts += [] if simulated is None else [f"sim{100 * simulated:.0f}"]
        save_result(result, "bench", *parts)
