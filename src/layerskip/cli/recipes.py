"""The verbs of recipes: list them, print one, draw one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from layerskip.cli.app import AsJson, app
from layerskip.cli.options import spread
from layerskip.cli.show.terminal import note, out
from layerskip.option import Option

DRAWN_LAYERS = 30  # of the built-in model
recipes = typer.Typer(no_args_is_help=True, help="List, show and draw the recipes of `layerskip train`.")
app.add_typer(recipes, name="recipes")


def _recipes(begun: str) -> list[str]:
    from layerskip.train.job.recipe import recipe_names

    return [name for name in recipe_names() if name.startswith(begun)]


def _keys(begun: str) -> list[str]:
    from layerskip.train.job.recipe import NESTED, Recipe

    keys = [key for key in Recipe.model_fields if key not in NESTED]
    keys += [f"{outer}.{key}" for outer, kind in NESTED.items() for key in kind.model_fields]
    return [f"{key}=" for key in keys if key.startswith(begun)]


Name = Annotated[
    str,
    typer.Argument(help="Built-in recipe or YAML file.", show_default=False, autocompletion=_recipes),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings over the recipe's, such as steps=200 or lora.rank=8.",
        show_default=False,
        autocompletion=_keys,
    ),
]


def recipe_verb(function: Callable[..., None]) -> Callable[..., None]:
    return recipes.command()(spread(function))


@recipe_verb
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


@recipe_verb
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


@recipe_verb
def plot(
    name: Name,
    settings: Settings = None,
    layers: Annotated[int | None, Option("Depth of the model.", shown="the recipe's, else 30")] = None,
    output: Annotated[
        Path | None, Option("Picture to write.", flags=("--output", "-o"), shown="recipe-NAME.png")
    ] = None,
    text: Annotated[bool, Option("Draw with characters.")] = False,
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
            note('no matplotlib (pip install "layerskip[measure]"), so with characters:')
    out.print(Text(text_picture(schedule, steps, out.width)))
