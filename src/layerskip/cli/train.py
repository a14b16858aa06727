"""The verb train: teach a model's exits by a recipe."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

from layerskip.cli.app import verb
from layerskip.cli.recipes import Name, Settings
from layerskip.cli.results import progress
from layerskip.cli.show.terminal import err, loudness, notes, out
from layerskip.option import Option
from layerskip.watch import silent

if TYPE_CHECKING:
    from rich.console import Console

    from layerskip.train.job.plan import Run
    from layerskip.train.job.recipe import Recipe


@verb
def train(
    recipe: Name,
    settings: Settings = None,
    resume: Annotated[bool, Option("Continue the run in the output folder, if one was begun.")] = False,
    plan: Annotated[bool, Option("Check everything and print the plan, then stop.")] = False,
    as_json: Annotated[
        bool, Option("Nothing but the final JSON line on standard output.", flags=("--json",))
    ] = False,
) -> None:
    """Teach a model's exits by a recipe. The last line printed is a JSON object with every exit's loss.

    layerskip train exit-adapter model=./your-model data=own.jsonl output=my-model
    """
    from layerskip.train.job.recipe import read_recipe

    first = int(os.environ.get("RANK", "0")) == 0
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        err.quiet = notes.quiet = True  # its errors are those of the node's first process
    chosen = read_recipe(recipe, settings or [])
    console = notes if as_json else out
    out.quiet = out.quiet or not first
    run = _prepared(chosen, resume, console, first, plan)
    if plan:
        if first:
            print(json.dumps({**run.plan, "warnings": run.warnings}), flush=True)
        return
    result = _trained(run, console, first)
    if first:
        from layerskip.cli.show.training import print_result

        print_result(console, result)
        print(json.dumps(result), flush=True)
    if result["interrupted"]:
        sys.exit(130)


def _prepared(recipe: Recipe, resume: bool, console: Console, first: bool, planning: bool) -> Run:
    with progress("loading") if first else nullcontext(silent) as watch:
        import torch
        from transformers.utils import logging

        from layerskip.cli.show.training import print_plan, print_recipe
        from layerskip.model.threads import chosen_threads, keep_memory
        from layerskip.train.job.run import prepare

        logging.disable_progress_bar()
        if not loudness.verbose:
            logging.set_verbosity_error()  # what matters of its warnings, we raise
        torch.set_num_threads(chosen_threads())
        keep_memory()
        if first:
            print_recipe(console, recipe)
        run = prepare(recipe, resume, watch, planning)
    if first:
        print_plan(console, run.plan, run.warnings)
    return run


def _trained(run: Run, console: Console, first: bool) -> dict[str, Any]:
    from layerskip.cli.show.training import Report
    from layerskip.train.job.run import finish

    report = Report(console) if first else None
    try:
        return finish(run, [] if report is None else [report])
    finally:
        if report is not None:
            report.close()
