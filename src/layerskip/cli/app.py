"""The command line's common part: the Typer app, `verb`, the options several verbs share, loading a model."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerskip.cli.options import spread, without, worded
from layerskip.cli.show.terminal import loudness, note, notes, out
from layerskip.decode.options import DraftOptions, LoadOptions, Options, SamplingOptions
from layerskip.errors import UserError
from layerskip.option import Option

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a language model draft for itself: exact self-speculative decoding with early exits.",
)


def _version(asked: bool) -> None:
    if asked:
        out.print(f"layerskip {metadata.version('layerskip')}")
        raise typer.Exit


@app.callback()
def _before_the_verb(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what caused an error, and warnings of libraries.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No notes, warnings or progress on stderr; errors only.")
    ] = False,
) -> None:
    if verbose and quiet:
        raise UserError("--verbose and --quiet exclude each other", "give one of them")
    loudness.set(verbose, quiet)


def _models(begun: str) -> list[str]:
    from layerskip.checkpoint.catalogue import BUILTINS

    return [one.name for one in BUILTINS if one.name.startswith(begun)]


Model = Annotated[
    str,
    typer.Argument(
        help="Built-in name, Hugging Face folder, or hub id.", show_default=False, autocompletion=_models
    ),
]
Loading = LoadOptions
Drafting = Annotated[DraftOptions, without("simulate_acceptance")]
Sampling = Annotated[SamplingOptions, worded("seed", shown="drawn anew and told")]
AsJson = Annotated[bool, Option("Print one JSON object per result.", flags=("--json",))]
Save = Annotated[bool, Option("Write a result file.")]


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Add a function to the command line under its name, its dataclasses spread out; see `cli.options`."""
    return app.command()(spread(function))


def merged(*options: Any, **more: Any) -> dict[str, Any]:
    """Join dataclasses to the keywords of `generate`. Raises: UserError for what does not go together."""
    keywords = {name: value for group in options for name, value in vars(group).items()} | more
    _ = Options.parse(keywords).processing
    return keywords


def drawn(drafting: DraftOptions, sampling: SamplingOptions) -> dict[str, Any]:
    """Join what decides an output, with a seed drawn where none is given: torch's generator starts alike each time.

    Raises: UserError as `merged`.
    """
    options = merged(drafting, sampling)
    if sampling.temperature and sampling.seed is None:
        options["seed"] = secrets.randbits(32)
    return options


def check_exit(model: str, options: dict[str, Any]) -> None:
    """Refuse an exit layer that the model does not have before it is loaded. Raises: UserError."""
    if options["exit_layer"] is None:
        return
    from layerskip.checkpoint.configuration import num_layers_in
    from layerskip.checkpoint.facts import Facts
    from layerskip.checkpoint.resolve import at_hand

    folder = at_hand(model)
    if folder is not None and (layers := num_layers_in(folder)) is not None:
        Options.parse(options).plan(Facts(), layers)


def exit_layers(given: str) -> list[int] | None:
    """Read --exits: None for all. Raises: UserError."""
    allowed = "--exits is all, or layers from 1 on with commas between: 1,4,8"
    return None if given == "all" else listed_layers(given, allowed)


def listed_layers(
    given: str, allowed: str = "--exits is a comma-separated list of layers, such as 4,6,8"
) -> list[int]:
    """Read layers with commas between. Raises: UserError with what is allowed."""
    names = [name.strip() for name in given.split(",")]
    if not all(name.isdecimal() and int(name) for name in names):
        raise UserError(f"exits {given!r}", allowed)
    return sorted({int(name) for name in names})


def load(model: str, how: LoadOptions) -> LanguageModel:
    """Load a model, saying so on stderr while it takes time, with a thread for each physical core."""
    if not notes.is_terminal:
        note(f"loading {model}")
    with notes.status(f"Loading {model} …"):  # shown on terminals only
        from transformers.utils import logging

        from layerskip.decode import load as loading
        from layerskip.model.threads import chosen_threads

        logging.disable_progress_bar()
        if not loudness.verbose:
            logging.set_verbosity_error()  # what matters of its warnings, we raise
    return loading.load(model, **vars(how) | {"threads": chosen_threads(how.threads)})
