"""The verbs that train: train, recipes. `register` adds them to the app; heavy imports happen inside."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from layerskip.cli.app import AsJson  # noqa: TC001 (typer reads it)
from layerskip.cli.show.terminal import err, out

if TYPE_CHECKING:
    from rich.console import Console

    from layerskip.train.job.recipe import Recipe
    from layerskip.watch import Watch

DRAWN_LAYERS = 30  # of the built-in model
recipes = typer.Typer(no_args_is_help=True, help="List, show and draw the recipes of `layerskip train`.")
Name = Annotated[str, typer.Argument(help="Built-in recipe or YAML file.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Argument(help="Settings over the recipe's, such as steps=200 or lora.rank=8.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file to the command line."""
    app.command()(train)
    app.add_typer(recipes, name="recipes")


def train(
    recipe: Name,
    settings: Settings = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the output folder, if one was begun.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Nothing but the final JSON line on standard output.")
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


@recipes.command()
def ls(as_json: AsJson = False) -> None:
    """List the built-in recipes.

    layerskip recipes ls
    """
    from layerskip.train.job.recipe import FSDP_SETTINGS, read_recipe, recipe_names

    known = [read_recipe(name) for name in recipe_names()]
    if as_json:
        rows = [{"name": r.name, "description": r.description, "source": r.source} for r in known]
        print(json.dumps(rows))
        return
    width = max(len(recipe.name) for recipe in known)
    for recipe in known:
        out.print(Text(f"{recipe.name:<{width}}", style="bold") + Text(f"  {recipe.description}"))
    told = (
        "A YAML file of your own works in the same place. Several GPUs: torchrun --nproc_per_node N -m layerskip "
        f"train ...; parameters sharded as well: accelerate launch --config_file {FSDP_SETTINGS} --num_processes N "
        "-m layerskip train ..."
    )
    out.print(Text(told, style="dim"))


@recipes.command()
def show(name: Name, settings: Settings = None, as_json: AsJson = False) -> None:
    """Print a recipe whole, every key explained; the output is a recipe file.

    layerskip recipes show topv2 > mine.yaml
    """
    from layerskip.train.job.recipe import as_yaml, read_recipe

    recipe = read_recipe(name, settings or [])
    if as_json:
        print(json.dumps(recipe.model_dump()))
        return
    for line in as_yaml(recipe).splitlines():
        value, mark, comment = line.partition("  # ")
        out.print(Text(value) + Text(mark + comment, style="dim"))


@recipes.command()
def plot(
    name: Name,
    settings: Settings = None,
    layers: Annotated[
        int | None, typer.Option(help="Depth of the model.", show_default="the recipe's, else 30")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Picture to write.", show_default="recipe-NAME.png")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Draw with characters.")] = False,
) -> None:
    """Draw drop rates by layer and time, which exits are on when, and how much each counts.

    layerskip recipes plot topv2
    """
    from layerskip.train.job.plot import picture, text_picture
    from layerskip.train.job.recipe import read_recipe
    from layerskip.train.job.run import schedule_for

    recipe = read_recipe(name, settings or [])
    num_layers = layers or recipe.layers or DRAWN_LAYERS
    schedule, steps = schedule_for(recipe, num_layers), recipe.steps or 1000
    if not text:
        file = output or Path(f"recipe-{recipe.name}.png")
        title = f"{recipe.name}, {num_layers} layers" + ("" if recipe.steps else ", drawn for 1000 steps")
        try:
            out.print(Text(f"written: {picture(schedule, steps, title, file)}"))
            return
        except ImportError:
            err.print(
                Text('no matplotlib (pip install "layerskip[measure]"), so with characters:', style="dim")
            )
    out.print(Text(text_picture(schedule, steps, out.width)))


# -- shared by the verbs -------------------------------------------------------------------------------------


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
