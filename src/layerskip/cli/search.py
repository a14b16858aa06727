"""The verb search: short runs of a recipe that find its best settings for a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from layerskip.cli.app import AsJson, verb
from layerskip.cli.recipes import Name, Settings
from layerskip.cli.results import progress
from layerskip.cli.show.terminal import note, out, tell
from layerskip.errors import UserError
from layerskip.option import Option

UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


@verb
def search(
    recipe: Name,
    settings: Settings = None,
    output: Annotated[
        Path, Option("Folder of the search; one that is there goes on.", flags=("--output", "-o"))
    ] = Path("search"),
    budget: Annotated[str, Option("Time for all runs, such as 2h or 90m.")] = "2h",
    max_cost: Annotated[str, Option("How much perplexity of the whole model may rise.")] = "1%",
    trials: Annotated[int | None, Option("Runs at most.", least=1, shown="as the budget allows")] = None,
    seed: Annotated[int, Option("Decides what is tried.", least=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Find the best settings of a recipe by short runs; ranges are key=low..high or key=a|b.

    layerskip search exit-adapter model=./your-model data=own.jsonl eval_data=held.jsonl steps=200 --budget 2h
    """
    try:
        from layerskip.search.report import report
        from layerskip.search.runs import StoppedError
        from layerskip.search.study import SPEEDUP, WHY, Search
    except ImportError as error:
        raise UserError("a search needs optuna", 'pip install "layerskip[search]"') from error
    from layerskip.search.space import read_space

    made = Search(
        output, recipe, read_space(settings or [], recipe), seconds(budget), share(max_cost), trials, seed
    )
    try:
        with progress() as watch:
            for trial in made.run(watch):
                speedup = trial.user_attrs.get(SPEEDUP)
                value = "" if speedup is None else f", {speedup:.2f} x predicted"
                why = trial.user_attrs.get(WHY)
                note(f"trial {trial.number} {trial.state.name.lower()}{value}{f': {why}' if why else ''}")
    except (KeyboardInterrupt, StoppedError):
        note("stopped; the same command goes on")
    tell(report(made), as_json, _show)


def _show(told: dict[str, Any]) -> None:
    out.print(
        f"{told['trials']} trials in {told['spent_s'] / 60:.0f} minutes, {told['finished']} to their end"
    )
    if (best := told["best"]) is not None:
        out.print(f"best: trial {best['trial']}, {best['speedup']:.2f} x predicted: {best['settings']}")
        out.print(f"  layerskip train {best['recipe']} output=FOLDER steps=...")
    out.print(f"report: {told['folder']}/report.md")


def seconds(text: str) -> float:
    """Read a time such as 2h, 90m or 45s. Raises: UserError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|d)\s*", text)
    if found is None:
        raise UserError(f"--budget is {text!r}", "write a time such as 2h, 90m or 45s")
    return float(found[1]) * UNITS[found[2]]


def share(text: str) -> float:
    """Read a share such as 1% or 0.01. Raises: UserError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if found is None:
        raise UserError(f"--max-cost is {text!r}", "write a share such as 1%")
    return float(found[1]) / (100 if found[2] else 1)
