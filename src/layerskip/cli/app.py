"""The command line's common part: the Typer app, the options several verbs share, loading a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from layerskip.cli.show.terminal import err
from layerskip.errors import UserError

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a language model draft for itself: exact self-speculative decoding with early exits.",
)
Model = Annotated[
    str, typer.Argument(help="Built-in name, Hugging Face folder, or hub id.", show_default=False)
]
Mode = Annotated[
    str | None, typer.Option(help="ar, early-exit or self-speculative.", show_default="by checkpoint")
]
ExitLayer = Annotated[int | None, typer.Option(help="E, layers that draft.", show_default="by checkpoint")]
DraftLength = Annotated[
    int | None, typer.Option(help="K, tokens drafted per round.", show_default="by checkpoint")
]
MaxNew = Annotated[int, typer.Option(help="Budget of new tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="Keep the smallest set with this probability; 1 is off.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the most probable; 0 is off.")]
Penalty = Annotated[float, typer.Option(help="Divide logits of tokens already present; 1 is off.")]
Seed = Annotated[int, typer.Option(help="Sampling is repeatable per seed.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="Stop before this text; may be repeated.", show_default=False)
]
DraftVocab = Annotated[str, typer.Option(help="Tokens the draft head knows: a number, auto or off.")]
Policy = Annotated[
    str | None,
    typer.Option(
        help="Who chooses E and K each round: fixed, confidence or adaptive.", show_default="by checkpoint"
    ),
]
Confidence = Annotated[
    float | None,
    typer.Option(
        help="Stop drafting where the exit's largest probability is below this.", show_default="by policy"
    ),
]
Guard = Annotated[
    bool | None,
    typer.Option(
        "--guard/--no-guard",
        help="Take plain steps while they are faster.",
        show_default="unless the policy is fixed",
    ),
]
Prompts = Annotated[
    Path | None, typer.Option(help="JSON lines with prompt or messages.", show_default="ten built in")
]
Limit = Annotated[int | None, typer.Option(help="Use the first prompts only.", show_default="all")]
Separator = Annotated[
    str, typer.Option(help="What follows a text prompt that is not wrapped; \\n is a line break.")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, float64 or auto.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per result.")]
StackName = Annotated[str, typer.Option("--stack", help="native, hf or auto.")]
Quantize = Annotated[str | None, typer.Option(help="int8: weights in 8 bit.", show_default="off")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="one per physical core")]


def vocabulary_size(given: str) -> int | str:
    """Read --draft-vocab: a number of tokens, auto or off. Raises: UserError."""
    if given in ("auto", "off"):
        return given
    if not given.isdecimal():
        raise UserError(f"draft vocabulary {given!r}", "--draft-vocab is a number of tokens, auto or off")
    return int(given)


def exit_layers(given: str) -> list[int] | None:
    """Read --exits: None for all. Raises: UserError."""
    allowed = "--exits is all, or layers from 1 on with commas between: 1,4,8"
    return None if given == "all" else listed_layers(given, allowed)


def listed_layers(given: str, allowed: str) -> list[int]:
    """Read layers with commas between. Raises: UserError with what is allowed."""
    names = [name.strip() for name in given.split(",")]
    if not all(name.isdecimal() and int(name) for name in names):
        raise UserError(f"exits {given!r}", allowed)
    return sorted({int(name) for name in names})


def load(
    model: str,
    dtype: str,
    device: str,
    stack: str = "auto",
    quantize: str | None = None,
    threads: int | None = None,
) -> LanguageModel:
    """Load a model, saying so on stderr while it takes time; set the CPU threads and warn of busy cores."""
    if threads is not None and threads < 1:
        raise UserError(f"--threads is {threads}", "--threads is at least 1")
    with err.status(f"Loading {model} …"):
        import torch
        from transformers.utils import logging

        from layerskip.decode import load as loading
        from layerskip.model.threads import BUSY, busy_cores, chosen_threads

        logging.disable_progress_bar()
        logging.set_verbosity_error()  # what matters of its warnings, we raise
    torch.set_num_threads(threads or chosen_threads())
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    busy = busy_cores() if on_cpu else None
    lm = loading.load(model, dtype=dtype, device=device, stack=stack, quantize=quantize)
    if busy is not None and busy > BUSY:
        warning = f"warning: others keep {busy:.1f} cores busy; decoding beside them can be many times slower"
        err.print(Text(warning, style="yellow"))
    return lm
