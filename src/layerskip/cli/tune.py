"""The verb tune: which source of drafts, with which settings, does it pay here? Measured."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

from rich.text import Text

from layerskip.cli.app import AsJson, Loading, Model, verb
from layerskip.cli.doctor import Asked
from layerskip.cli.options import Given
from layerskip.cli.results import configuration, loaded, progress
from layerskip.cli.show.advice import print_tune
from layerskip.cli.show.terminal import err, tell
from layerskip.option import Option


@verb
def tune(
    model: Model,
    asked: Asked,
    loading: Loading,
    given: Given,
    batch_size: Annotated[int, Option("Tune for this many prompts decoded together.", least=1)] = 1,
    seconds: Annotated[int, Option("Time for measuring, prediction apart.", least=1)] = 180,
    save: Annotated[bool, Option("Make the choice the checkpoint's default.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find what drafts fastest for your prompts (copies, an exit, both) with which settings, by measurement.

    layerskip tune ./my-model --prompts prompts.jsonl --save
    """
    lines = asked.lines()
    lm, load_s = loaded(model, loading)
    from layerskip.measure.advice.prediction import analyse, default_cell, predict_copies
    from layerskip.measure.advice.tune import finalists, halving, save_choice, tuned
    from layerskip.measure.proof.equality import equality_promised

    budget, (_, items) = asked.max_new_tokens, asked.encoded(lm, lines)
    with progress() as watch:
        analysis = analyse(lm, items, budget, asked.exits, asked.draft_vocab, batch_size, watch)
        predict_copies(lm, analysis, watch)
        trials = finalists(analysis, default_cell(lm))
        ranked = halving(lm, trials, items, budget, seconds, batch_size, watch)
    if (wrong := next((trial for trial in ranked if trial.differing), None)) and equality_promised(lm):
        where = f"that of prompt {wrong.differing[0] + 1} and {len(wrong.differing) - 1} more of {wrong.of}"
        setting = f"{wrong.cell}, policy {wrong.policy}"
        lost = f"not lossless: with {setting} outputs differ from plain decoding, {where}"
        err.print(Text(lost, style="bold red"))
        err.print(Text(f"nothing is saved; layerskip doctor {shlex.quote(model)} looks for the cause"))
        sys.exit(1)
    saved = save_choice(lm, ranked[0]) if save else None
    result = tuned(analysis, ranked)
    result["saved"] = None if saved is None else str(saved)
    result["how_to_save"] = f"layerskip tune {model} ... --save makes it the default of every verb"
    result["configuration"] = configuration(given, lm, load_s, **asked.looked_at(len(items)))
    tell(result, as_json, lambda told: print_tune({**told, "exits": list(lm.facts.exits)}))
