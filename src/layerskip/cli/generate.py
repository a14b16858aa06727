"""The verb generate: continue a prompt, or each of a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerskip.cli.app import AsJson, Drafting, Loading, Model, Sampling, check_exit, drawn, load, verb
from layerskip.cli.options import worded
from layerskip.cli.show.rounds import print_rounds, show, statistics_line
from layerskip.cli.show.terminal import note, tell
from layerskip.decode.options import Options
from layerskip.errors import UserError
from layerskip.option import Option
from layerskip.reading import USER_BYTES, read_text

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel


@verb
def generate(
    model: Model,
    drafting: Drafting,
    sampling: Annotated[Sampling, worded("batch_size", help="Rows decoded together with --batch-file.")],
    loading: Loading,
    prompt: Annotated[str | None, typer.Argument(help="Text; - or nothing reads standard input.")] = None,
    prompt_file: Annotated[Path | None, Option("Read the prompt from a file.")] = None,
    batch_file: Annotated[Path | None, Option("JSON lines with prompt or messages.")] = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, streaming; drafted and kept text is coloured.

    layerskip generate smollm2-135m "Why is the sky blue?" --mode self-speculative --exit-layer 2 --draft-length 2
    """
    prompts, ids = _prompts(prompt, prompt_file, batch_file)
    options = drawn(drafting, sampling)  # a slip costs no time
    check_exit(model, options)
    lm = load(model, loading)
    options["chat"] = lm.has_template if sampling.chat is None else sampling.chat
    if batch_file is None and not as_json:
        _stream(lm, prompts[0], options)
        return
    failed = False
    for one, own in zip(lm.each(prompts, **options), ids, strict=False):
        told = {} if own is None else {"id": own}
        told |= {name: getattr(one, name) for name in ("text", "tokens", "finish_reason", "stats")}
        if one.error is not None:
            failed, told = True, {**told, "error": str(one.error)}
        tell(told, as_json, _show)
    if failed:  # the other prompts have their answers
        sys.exit(1)


def _show(told: dict[str, Any]) -> None:
    show(told["text"] + "\n")
    note(
        told["error"] if "error" in told else statistics_line(told["stats"]),
        "red" if "error" in told else "dim",
    )


def _prompts(
    prompt: str | None, prompt_file: Path | None, batch_file: Path | None
) -> tuple[list[Any], list[Any]]:
    """Find the prompt: argument, file, batch file or standard input; exactly one of them; and the prompts' ids."""
    sources = {"PROMPT": prompt, "--prompt-file": prompt_file, "--batch-file": batch_file}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other", "give one source of prompts")
    if batch_file is not None:
        from layerskip.measure.lines import read_prompts

        lines = read_prompts(batch_file)
        return [line.content for line in lines], [line.id for line in lines]
    if prompt_file is not None:
        prompt = read_text(prompt_file, USER_BYTES, pipe=True)
    elif prompt is None or prompt == "-":
        if sys.stdin and sys.stdin.isatty():
            note("reading the prompt from standard input; end with Ctrl-D")
        try:
            prompt = sys.stdin.read() if sys.stdin else ""  # None where the shell closed it
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not text: {error}") from error
    if not prompt.strip():
        raise UserError(
            "the prompt is empty", 'layerskip generate MODEL "some text", --prompt-file, or a pipe'
        )
    return [prompt], [None]


def _stream(lm: LanguageModel, prompt: str, options: dict[str, Any]) -> None:
    from layerskip.decode.generation import statistics

    rounds = print_rounds(lm, lm.stream(prompt, **options), options["stop"])
    prompt_tokens = sum(round.prompt_tokens for round in rounds)
    stats = statistics(rounds, lm.plan(Options.parse(options)), prompt_tokens)
    note(statistics_line(stats | {"seed": options["seed"]}))
