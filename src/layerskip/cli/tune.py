"""The verbs that answer "which exit, which draft length, does it pay here?": doctor predicts, tune measures."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from layerskip.cli.app import (
    AsJson,
    Device,
    Dtype,
    Limit,
    Model,
    Prompts,
    Quantize,
    Separator,
    StackName,
    Threads,
    listed_layers,
    vocabulary_size,
)
from layerskip.cli.results import (
    check_counts,
    configuration,
    encoded,
    loaded,
    looked_at,
    progress,
    prompt_lines,
    unescaped,
)
from layerskip.cli.show.advice import print_doctor, print_tune
from layerskip.cli.show.terminal import err
from layerskip.errors import UserError

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel

MaxNewTokens = Annotated[int, typer.Option(help="Budget of each continuation.")]
AsChat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Wrap prompts as messages.", show_default="if it can"),
]
Exits = Annotated[
    str | None, typer.Option(help="E to try, comma-separated.", show_default="trained ones, or a spread")
]
Vocabulary = Annotated[str, typer.Option(help="Draft vocabulary: a number, auto (try several) or off.")]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file to the command line."""
    app.command()(doctor)
    app.command()(tune)


def doctor(
    model: Model,
    prompts: Prompts = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 64,
    chat: AsChat = None,
    separator: Separator = "",
    exits: Exits = None,
    draft_vocab: Vocabulary = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    stack: StackName = "auto",
    quantize: Quantize = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Say what self-speculation would gain here, with which settings, and what stands in its way.

    layerskip doctor smollm2-135m
    """
    given = {name: value for name, value in locals().items() if name != "as_json"}
    lines, layers, size = _checked(prompts, limit, max_new_tokens, exits, draft_vocab, threads)
    lm, load_s = loaded(model, dtype, device, stack, quantize, threads)
    from layerskip.measure.advice.doctor import examine
    from layerskip.measure.advice.prediction import analyse

    as_chat = lm.has_template if chat is None else chat
    items = _encoded(lm, lines, as_chat, separator, max_new_tokens)
    with progress() as watch:
        analysis = analyse(lm, items, max_new_tokens, layers, size, watch=watch)
        watch("decoding twice", 0, 0)
        result = examine(lm, analysis, as_chat, shlex.quote(model), _repeated(given))
    result["configuration"] = configuration(given, lm, load_s, **looked_at(prompts, len(items)))
    if as_json:
        print(json.dumps(result))
    else:
        print_doctor(result)


def tune(
    model: Model,
    prompts: Prompts = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 64,
    chat: AsChat = None,
    separator: Separator = "",
    exits: Exits = None,
    draft_vocab: Vocabulary = "auto",
    batch_size: Annotated[int, typer.Option(help="Tune for this many prompts decoded together.")] = 1,
    seconds: Annotated[int, typer.Option(help="Time for measuring, prediction apart.")] = 180,
    save: Annotated[bool, typer.Option("--save", help="Make the choice the checkpoint's default.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    stack: StackName = "auto",
    quantize: Quantize = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Find the fastest exit layer, draft length and draft vocabulary for your prompts, by measurement.

    layerskip tune ./my-model --prompts prompts.jsonl --save
    """
    given = {name: value for name, value in locals().items() if name not in ("as_json", "save")}
    check_counts(**{"batch-size": batch_size, "seconds": seconds})
    lines, layers, size = _checked(prompts, limit, max_new_tokens, exits, draft_vocab, threads)
    lm, load_s = loaded(model, dtype, device, stack, quantize, threads)
    from layerskip.measure.advice.doctor import cell_text, equality_promised
    from layerskip.measure.advice.prediction import analyse, default_cell
    from layerskip.measure.advice.tune import finalists, halving, save_choice, tuned

    as_chat = lm.has_template if chat is None else chat
    items = _encoded(lm, lines, as_chat, separator, max_new_tokens)
    with progress() as watch:
        analysis = analyse(lm, items, max_new_tokens, layers, size, batch_size, watch)
        trials = finalists(analysis, default_cell(lm))
        ranked = halving(lm, trials, items, max_new_tokens, seconds, batch_size, watch)
    if (wrong := next((trial for trial in ranked if trial.differing), None)) and equality_promised(lm):
        where = f"that of prompt {wrong.differing[0] + 1} and {len(wrong.differing) - 1} more of {wrong.of}"
        setting = f"{cell_text(wrong.cell)}, policy {wrong.policy}"
        lost = f"not lossless: with {setting} outputs differ from plain decoding, {where}"
        err.print(Text(lost, style="bold red"))
        err.print(Text(f"nothing is saved; layerskip doctor {shlex.quote(model)} looks for the cause"))
        sys.exit(1)
    saved = save_choice(lm, ranked[0]) if save else None
    result = tuned(analysis, ranked)
    result["saved"] = None if saved is None else str(saved)
    result["how_to_save"] = f"layerskip tune {model} ... --save makes it the default of every verb"
    result["configuration"] = configuration(given, lm, load_s, **looked_at(prompts, len(items)))
    if as_json:
        print(json.dumps(result))
    else:
        print_tune({**result, "exits": list(lm.facts.exits)})


# -- shared by both ------------------------------------------------------------------------------------------


def _repeated(given: dict[str, Any]) -> str:
    """Spell the doctor's options that are not at their default, for another verb."""
    words = []
    for name, parameter in inspect.signature(doctor).parameters.items():
        option, value = name.replace("_", "-"), given.get(name, parameter.default)
        if name == "model" or value == parameter.default:
            continue
        if isinstance(value, bool):
            words.append(f" --{option}" if value else f" --no-{option}")
        else:
            words.append(f" --{option} {shlex.quote(str(value))}")
    return "".join(words)


def _checked(
    prompts: Path | None,
    limit: int | None,
    max_new_tokens: int,
    exits: str | None,
    draft_vocab: str,
    threads: int | None,
) -> tuple[list[Any], list[int] | None, int | str]:
    """Refuse slips before a model is loaded."""
    check_counts(limit=limit, threads=threads)
    if max_new_tokens < 2:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}", "at least two: the first comes from the prompt"
        )
    allowed = "--exits is a comma-separated list of layers, such as 4,6,8"
    layers = None if exits is None else listed_layers(exits, allowed)
    return prompt_lines(prompts, limit), layers, vocabulary_size(draft_vocab)


def _encoded(
    lm: LanguageModel, lines: list[Any], chat: bool, separator: str, max_new_tokens: int
) -> list[list[int]]:
    items = [encoded(lm, line.content, chat, unescaped(separator)) for line in lines]
    context = lm.stack.context
    for number, tokens in enumerate(items, 1):
        if context is not None and len(tokens) + max_new_tokens > context:
            raise UserError(
                f"prompt {number} has {len(tokens)} tokens; with {max_new_tokens} new ones it passes the context "
                f"of {context}",
                "lower --max-new-tokens, or leave such prompts out",
            )
    return items
