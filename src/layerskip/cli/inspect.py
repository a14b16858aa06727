"""The verb inspect: what every layer would say, and how drafting fares."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from layerskip.cli.app import AsJson, Loading, Model, Save, exit_layers, merged, verb
from layerskip.cli.options import Given, only, without
from layerskip.cli.results import configuration, loaded, save_result
from layerskip.cli.show.terminal import note, tell
from layerskip.decode.options import DraftOptions
from layerskip.errors import UserError
from layerskip.option import Option


@verb
def inspect(
    model: Model,
    text: Annotated[str, typer.Argument(help="What the model reads.", show_default=False)],
    drafting: Annotated[DraftOptions, only("exit_layer", "draft_length", "draft_vocab", "policy")],
    loading: Annotated[Loading, without("quantize")],
    given: Given,
    generate: Annotated[
        int,
        Option(
            "Continue by N tokens, look at those, and show the rounds.",
            least=0,
            flags=("--generate", "--max-new-tokens"),
        ),
    ] = 0,
    exits: Annotated[str, Option("Rows to show: all, or layers such as 1,4,8.")] = "all",
    chat: Annotated[
        bool | None, Option("Wrap the text as a message.", shown="with --generate, if it can")
    ] = None,
    output: Annotated[
        Path | None, Option("Draw a picture; the rounds go to NAME-timeline.", flags=("--output", "-o"))
    ] = None,
    save: Save = False,
    as_json: AsJson = False,
) -> None:
    """Show what every layer would say at every position, and how drafting fares: the logit lens and the timeline.

    layerskip inspect smollm2-135m "The capital of France is" --output lens.png
    """
    rows = exit_layers(exits)
    if not text.strip():
        raise UserError("the text is empty", 'layerskip inspect MODEL "some text"')
    speculation = merged(drafting) | {"mode": "self-speculative", "max_new_tokens": max(1, generate)}
    if output is not None:
        from layerskip.measure.exits import draw

        draw.check(output)
    lm, load_s = loaded(model, loading)
    from layerskip.cli.show.inspection import print_inspection
    from layerskip.measure.exits.lens import lens
    from layerskip.measure.exits.states import own_heads
    from layerskip.measure.exits.timeline import timeline

    wrapped = bool(generate) and lm.has_template if chat is None else chat
    tokens, first, shown = lm.encode(text, chat=wrapped), 0, None
    if generate:
        rounds = list(lm.stream(tokens, **speculation))
        shown = timeline(rounds, lm.tokenizer)
        # From the position that predicts the first new token to the one that predicts the last.
        first = len(tokens) - 1
        tokens = [*tokens, *(token for round in rounds for token in round.tokens)][:-1]
    heads = own_heads(lm)
    seen = lens(lm.stack, lm.tokenizer, tokens, rows, first, heads)
    for exit_layer, head in heads.items():
        if not exit_layer:
            continue  # the embedding is no layer to look at
        note(f"exit {exit_layer} is read by its own draft head of {head.size:,} tokens")
    result: dict[str, Any] = {"lens": asdict(seen), "timeline": shown and asdict(shown)}
    result["configuration"] = configuration(given, lm, load_s, chat=wrapped)
    tell(result, as_json, lambda _: print_inspection(seen, shown))
    if output is not None:
        title = draw.headline(result["configuration"]["model"], text)
        written = [draw.lens(seen, output, title)]
        if shown is not None:
            written.append(draw.timeline(shown, output.with_stem(f"{output.stem}-timeline"), title))
        note(f"written: {', '.join(map(str, written))}")
    if save:
        save_result(result, "inspect")
