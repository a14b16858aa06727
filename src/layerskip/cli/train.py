"""The verb train: teach a model's exits by a recipe."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from layerskip.cli.app import verb
from layerskip.cli.recipes import Name, Settings
from layerskip.cli.show.terminal import err, out
from layerskip.option import Option

if TYPE_CHECKING:
    from rich.console import Console

    from layerskip.train.job.recipe import Recipe
    from layerskip.watch import Watch


@verb
def train(
    recipe: Name,
    settings: Settings = None,
    resume: Annotated[bool, Option("Continue the run in the output folder, if one was begun.")] = False,
    as_json: Annotated[
        bool, Option("Nothing but the final JSON line on standard output.", flags=("--json",))
    ] = False,
) -> None:
    """Teach a model's exits by a recipe. The last line printed is a JSON object with every exit's loss.

    layerskip train finetune data=chats.jsonl output=my-model
    """
    from layerskip.train.job.recipe import read_recipe

    first = int(os.environ.get("RANK", "0")) == 0
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        err.quiet = True  # its errors are those of the node's first process
    chosen = read_recipe(recipe, settings or [])
    console = err if as_json else out
    out.quiet = out.quiet or not first
    result = _trained(chosen, resume, console, first)
    if first:
        from layerskip.cli.show.training import print_result

        print_result(console, result)
        print(json.dumps(result), flush=True)
    if result["interrupted"]:
        sys.exit(130)


def _trained(recipe: Recipe, resume: bool, console: Console, first: bool) -> dict[str, Any]:
    with _status(err, first) as watch:
        import torch
        from transformers.utils import logging

        from layerskip.cli.show.training import Report, print_plan, print_recipe
        from layerskip.model.threads import chosen_threads
        from layerskip.train.job import run

        logging.disable_progress_bar()
        logging.set_verbosity_error()  # what matters of its warnings, we raise
        torch.set_num_threads(chosen_threads())
        if first:
            print_recipe(console, recipe)
        prepared = run.prepare(recipe, resume, watch)
    if first:
        print_plan(console, prepared.plan, prepared.warnings)
    report = Report(console) if first else None
    try:
        return run.finish(prepared, [] if report is None else [report])
    finally:
        if report is not None:
            report.close()


@contextmanager
def _status(console: Console, first: bool) -> Iterator[Watch]:
    """Show on stderr what is being read, while a terminal looks on."""
    if not (first and console.is_terminal):
        yield lambda what, done, of: None
        return
    with console.status("Loading …") as status:
        yield lambda what, done, of: status.update(f"{what}: {done:,}" + (f" of {of:,}" if of else ""))
