"""The verb demo: plain and self-speculative decoding side by side."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.text import Text

from layerskip.cli.app import AsJson, Loading, load, verb
from layerskip.cli.options import default, only
from layerskip.cli.show.bench import print_contests
from layerskip.cli.show.terminal import out
from layerskip.decode.options import DraftOptions, SamplingOptions


@verb
def demo(
    drafting: Annotated[DraftOptions, only("exit_layer", "draft_length")],
    budget: Annotated[SamplingOptions, only("max_new_tokens"), default(max_new_tokens=64)],
    loading: Loading,
    model: Annotated[str, typer.Argument(help="Built-in name, folder or hub id.")] = "smollm2-135m",
    as_json: AsJson = False,
) -> None:
    """Decode four real prompts plainly and self-speculatively: equality first, then speed.

    layerskip demo
    """
    from layerskip.measure.speed.contests import as_record, contests

    lm = load(model, loading)
    results = []
    for contest in contests(lm, drafting.exit_layer, drafting.draft_length, budget.max_new_tokens):
        results.append(contest)
        if not as_json:
            out.print(
                Text(f"\n[{contest.task}]", style="bold"), Text(contest.speculative.text.strip()), sep="\n"
            )
    if as_json:
        print(json.dumps(as_record(model, lm, results)))
    else:
        print_contests(model, lm, results)
