"""The verb chat: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from rich.text import Text

from layerskip.cli.app import Drafting, Loading, Model, Sampling, check_exit, drawn, load, verb
from layerskip.cli.options import default, without
from layerskip.cli.show.rounds import print_rounds, statistics_line
from layerskip.cli.show.terminal import err, note, out
from layerskip.errors import UserError, nearest
from layerskip.option import Option


@verb
def chat(
    model: Model,
    drafting: Drafting,
    sampling: Annotated[Sampling, default(max_new_tokens=512), without("chat", "batch_size")],
    loading: Loading,
    system: Annotated[str | None, Option("System message.")] = None,
    context: Annotated[int | None, Option("Tokens to keep; the model's own by default.")] = None,
) -> None:
    """Talk with a model; the cache is kept between turns. /reset forgets, /stats counts, /exit leaves.

    layerskip chat smollm2-135m --temperature 0.7 --top-p 0.9
    """
    options = drawn(drafting, sampling)
    check_exit(model, options)
    lm = load(model, loading)
    if not lm.has_template:
        lacks = "tokenizer" if lm.tokenizer is None else "chat template"
        raise UserError(
            f"{model} has no {lacks}, so it cannot chat", "layerskip generate continues plain text"
        )
    conversation = lm.chat(system=system, context=context, **options)
    note(f"{model}: /reset, /stats, /exit; Ctrl-C stops an answer")
    while (line := _ask()) is not None:
        if line.startswith("/"):
            if line in ("/exit", "/quit"):
                break
            _command(conversation, line)
        elif line:
            try:
                print_rounds(lm, conversation.send(line), options["stop"])
            except KeyboardInterrupt:
                pass  # the answer's line has been ended, and what was said stays
            except UserError as error:  # a turn that does not fit must not end the conversation
                err.print(Text(f"error: {error}", style="red"))


def _ask() -> str | None:
    """Read one line; None at the end of input."""
    if sys.stdin is None:
        return None
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            out.print()
        return None
    except KeyboardInterrupt:
        out.print()
        return ""
    except UnicodeDecodeError as error:
        err.print(Text(f"error: that line is not text: {error}", style="red"))
        return ""


def _command(conversation: Any, command: str) -> None:
    if command == "/reset":
        conversation.reset()
        note("forgotten")
    elif command == "/stats":
        last = conversation.last
        line = "nothing yet"
        if last is not None:
            computed = sum(round.prompt_tokens for round in last.rounds)
            prompt = f"prompt of {last.stats['prompt_tokens']} tokens, {computed} computed anew"
            line = f"{statistics_line(last.stats, computed)} · {prompt}"
        note(line)
    else:
        err.print(Text(f"unknown command {command}: {nearest(command, ['/exit', '/reset', '/stats'])}"))
