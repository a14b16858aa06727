"""The verb that looks inside: inspect. `register` adds it to the app; heavy imports happen inside."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from layerskip.cli.app import (
    AsJson,
    Device,
    DraftLength,
    DraftVocab,
    Dtype,
    ExitLayer,
    Model,
    Policy,
    StackName,
    Threads,
    exit_layers,
    vocabulary_size,
)
from layerskip.cli.results import configuration, loaded
from layerskip.cli.results import save as save_result
from layerskip.cli.show.terminal import err, out
from layerskip.errors import UserError

if TYPE_CHECKING:
    from layerskip.measure.exits.lens import Lens
    from layerskip.measure.exits.timeline import Timeline


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(inspect)


def inspect(
    model: Model,
    text: Annotated[str, typer.Argument(help="What the model reads.", show_default=False)],
    generate: Annotated[
        int,
        typer.Option(
            "--generate", "--max-new-tokens", help="Continue by N tokens, look at those, and show the rounds."
        ),
    ] = 0,
    exits: Annotated[str, typer.Option(help="Rows to show: all, or layers such as 1,4,8.")] = "all",
    exit_layer: ExitLayer = None,
    draft_length: DraftLength = None,
    draft_vocab: DraftVocab = "auto",
    policy: Policy = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Wrap the text as a message.", show_default="with --generate, if it can"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Draw a picture; the rounds go to NAME-timeline.", show_default=False
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    stack: StackName = "auto",
    threads: Threads = None,
    save: Annotated[bool, typer.Option("--save", help="Write a result file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what every layer would say at every position, and how drafting fares: the logit lens and the timeline.

    layerskip inspect smollm2-135m "The capital of France is" --output lens.png
    """
    given = {name: value for name, value in locals().items() if name not in ("as_json", "save", "output")}
    from layerskip.decode.options import Options

    rows = exit_layers(exits)
    if not text.strip():
        raise UserError("the text is empty", 'layerskip inspect MODEL "some text"')
    if generate < 0:
        raise UserError(f"--generate is {generate}", "give the number of tokens to continue by")
    speculation = {
        "mode": "self-speculative",
        "exit_layer": exit_layer,
        "draft_length": draft_length,
        "draft_vocab": vocabulary_size(draft_vocab),
        "policy": policy,
        "max_new_tokens": max(1, generate),
    }
    Options.parse(speculation)
    if output is not None:
        from layerskip.measure.exits import draw

        draw.check(output)
    lm, load_s = loaded(model, dtype, device, stack, None, threads)
    from layerskip.measure.exits.lens import lens
    from layerskip.measure.exits.timeline import timeline

    wrapped = bool(generate) and lm.has_template if chat is None else chat
    tokens, first, shown = lm.encode(text, chat=wrapped), 0, None
    if generate:
        rounds = list(lm.stream(tokens, **speculation))
        shown = timeline(rounds, lm.tokenizer)
        # From the position that predicts the first new token to the one that predicts the last.
        first = len(tokens) - 1
        tokens = [*tokens, *(token for round in rounds for token in round.tokens)][:-1]
    seen = lens(lm.stack, lm.tokenizer, tokens, rows, first)
    result: dict[str, Any] = {"lens": asdict(seen), "timeline": shown and asdict(shown)}
    result["configuration"] = configuration(given, lm, load_s, chat=wrapped)
    if as_json:
        print(json.dumps(result))
    else:
        _print(seen, shown)
    if output is not None:
        title = draw.headline(result["configuration"]["model"], text)
        written = [draw.lens(seen, output, title)]
        if shown is not None:
            written.append(draw.timeline(shown, output.with_stem(f"{output.stem}-timeline"), title))
        err.print(Text(f"written: {', '.join(map(str, written))}", style="dim"))
    if save:
        err.print(Text(f"written: {save_result(result, 'inspect')}", style="dim"))


def _print(seen: Lens, shown: Timeline | None) -> None:
    from layerskip.cli.show.inspection import lens_lines, settle_line, timeline_lines

    coloured = out.color_system is not None and not out.no_color
    for line in lens_lines(seen, out.width, coloured):
        out.print(line)
    out.print(Text(settle_line(seen)))
    if shown is not None:
        out.print()
        for line in timeline_lines(shown, out.width):
            out.print(line)
