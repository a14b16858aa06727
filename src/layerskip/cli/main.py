"""The command line: each verb parses, calls one function, prints. Heavy imports happen inside the verbs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from layerskip.cli import (
    bench as cli_measure,
)
from layerskip.cli import (
    distill_data as cli_distill,
)
from layerskip.cli import (
    eval as cli_eval,
)
from layerskip.cli import (
    inspect as cli_inspect,
)
from layerskip.cli import (
    pack_delta as cli_delta,
)
from layerskip.cli import (
    train as cli_train,
)
from layerskip.cli import (
    tune as cli_tune,
)
from layerskip.cli.app import (
    AsJson,
    Confidence,
    Device,
    DraftLength,
    DraftVocab,
    Dtype,
    ExitLayer,
    Guard,
    MaxNew,
    MinP,
    Mode,
    Model,
    Penalty,
    Policy,
    Quantize,
    Seed,
    StackName,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    app,
    load,
    vocabulary_size,
)
from layerskip.cli.show.terminal import (
    err,
    out,
    print_contests,
    print_rounds,
    show,
    statistics_line,
)
from layerskip.errors import UserError, nearest

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel


def main() -> None:
    """Run the command line; what a user caused is two lines on stderr and exit code 2."""
    try:
        app(prog_name="layerskip")
    except UserError as error:
        err.print(Text("error: ", style="bold red") + Text(error.message, style="default"))
        if error.hint:
            err.print(Text(f"  {error.hint}"))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Text; - or nothing reads standard input.")] = None,
    mode: Mode = None,
    exit_layer: ExitLayer = None,
    draft_length: DraftLength = None,
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Wrap the prompt as a message.", show_default="if it can"),
    ] = None,
    draft_vocab: DraftVocab = "auto",
    policy: Policy = None,
    confidence: Confidence = None,
    guard: Guard = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    stack: StackName = "auto",
    quantize: Quantize = None,
    threads: Threads = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    batch_file: Annotated[Path | None, typer.Option(help="JSON lines with prompt or messages.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows decoded together with --batch-file.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, streaming; drafted and kept text is coloured.

    layerskip generate smollm2-135m "Why is the sky blue?" --mode self-speculative --exit-layer 6 --draft-length 4
    """
    prompts: list[Any] = _prompts(prompt, prompt_file, batch_file)
    options = _options(
        mode=mode,
        exit_layer=exit_layer,
        draft_length=draft_length,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        draft_vocab=draft_vocab,
        policy=policy,
        confidence=confidence,
        guard=guard,
        batch_size=batch_size,
    )
    lm = load(model, dtype, device, stack, quantize, threads)
    options["chat"] = lm.has_template if chat is None else chat
    if batch_file is None and not as_json:
        _stream(lm, prompts[0], options)
        return
    for result in lm.each(prompts, **options):
        if as_json:
            line = {"text": result.text, "tokens": result.tokens, "finish_reason": result.finish_reason}
            print(json.dumps({**line, "stats": result.stats}), flush=True)
        else:
            show(result.text + "\n")
            err.print(Text(statistics_line(result.stats), style="dim"))


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    mode: Mode = None,
    exit_layer: ExitLayer = None,
    draft_length: DraftLength = None,
    max_new_tokens: MaxNew = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    draft_vocab: DraftVocab = "auto",
    policy: Policy = None,
    confidence: Confidence = None,
    guard: Guard = None,
    context: Annotated[int | None, typer.Option(help="Tokens to keep; the model's own by default.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    stack: StackName = "auto",
    quantize: Quantize = None,
    threads: Threads = None,
) -> None:
    """Talk with a model; the cache is kept between turns. /reset forgets, /stats counts, /exit leaves.

    layerskip chat smollm2-135m --temperature 0.7 --top-p 0.9
    """
    options = _options(
        mode=mode,
        exit_layer=exit_layer,
        draft_length=draft_length,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        draft_vocab=draft_vocab,
        policy=policy,
        confidence=confidence,
        guard=guard,
    )
    lm = load(model, dtype, device, stack, quantize, threads)
    if not lm.has_template:
        lacks = "tokenizer" if lm.tokenizer is None else "chat template"
        raise UserError(
            f"{model} has no {lacks}, so it cannot chat", "layerskip generate continues plain text"
        )
    conversation = lm.chat(system=system, context=context, **options)
    err.print(Text(f"{model}: /reset, /stats, /exit; Ctrl-C stops an answer", style="dim"))
    while (line := _ask()) is not None:
        if line.startswith("/"):
            if line in ("/exit", "/quit"):
                break
            _chat_command(conversation, line)
        elif line:
            try:
                print_rounds(lm, conversation.send(line), options["stop"])
            except KeyboardInterrupt:
                pass  # the answer's line has been ended, and what was said stays
            except UserError as error:  # a turn that does not fit must not end the conversation
                err.print(Text(f"error: {error}", style="red"))


@app.command()
def models(as_json: AsJson = False) -> None:
    """List built-in models and what is cached.

    layerskip models
    """
    from layerskip.checkpoint import resolve as hub

    rows = [
        {
            "name": builtin.name,
            "description": builtin.description,
            "licence": builtin.licence,
            "download_bytes": builtin.size_bytes,
            "path": None if (path := hub.cached(builtin.name)) is None else str(path),
        }
        for builtin in hub.builtins()
    ]
    if as_json:
        print(json.dumps(rows))
        return
    for builtin in hub.builtins():
        out.print(Text(builtin.name, style="bold") + Text(f"  {builtin.description} ({builtin.licence})"))
        cached = hub.cached(builtin.name)
        size = f"not downloaded yet, {builtin.size_bytes / 1e6:.0f} MB"
        out.print(Text(f"  {size if cached is None else cached}", style="dim"))
    out.print(Text("A Hugging Face folder or hub id works in the same place.", style="dim"))


@app.command()
def env(as_json: AsJson = False) -> None:
    """Show versions, devices, dtypes and the cache folder: what a bug report needs.

    layerskip env
    """
    from layerskip.measure.environment import environment

    facts = environment()
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(box=None, show_header=False)
    for key, value in facts.items():
        table.add_row(key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    out.print(table)


@app.command()
def demo(
    model: Annotated[str, typer.Argument(help="Built-in name, folder or hub id.")] = "smollm2-135m",
    exit_layer: ExitLayer = None,
    draft_length: DraftLength = None,
    max_new_tokens: MaxNew = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    stack: StackName = "auto",
    quantize: Quantize = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Decode three real prompts plainly and self-speculatively: equality first, then speed.

    layerskip demo
    """
    from layerskip.measure.speed.contests import as_record, contests

    lm = load(model, dtype, device, stack, quantize, threads)
    results = []
    for contest in contests(lm, exit_layer, draft_length, max_new_tokens):
        results.append(contest)
        if not as_json:
            out.print(
                Text(f"\n[{contest.task}]", style="bold"), Text(contest.speculative.text.strip()), sep="\n"
            )
    if as_json:
        print(json.dumps(as_record(model, lm, results)))
    else:
        print_contests(model, lm, results)


# -- shared by the verbs -------------------------------------------------------------------------------------


def _options(**given: Any) -> dict[str, Any]:
    """Check options before a model is loaded, so that a slip costs no time."""
    from layerskip.decode.options import Options

    given["draft_vocab"] = vocabulary_size(given["draft_vocab"])
    options = Options.parse(given)
    _ = options.processing
    return given


def _prompts(prompt: str | None, prompt_file: Path | None, batch_file: Path | None) -> list[Any]:
    """Find the prompt: argument, file, batch file or standard input; exactly one of them."""
    given = [
        name
        for name, value in (("PROMPT", prompt), ("--prompt-file", prompt_file), ("--batch-file", batch_file))
        if value is not None
    ]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other", "give one source of prompts")
    if batch_file is not None:
        from layerskip.config import read_prompts

        return [line.content for line in read_prompts(batch_file)]
    if prompt_file is not None:
        try:
            prompt = prompt_file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {prompt_file}: {error}") from error
    elif prompt is None or prompt == "-":
        if sys.stdin and sys.stdin.isatty():
            err.print(Text("reading the prompt from standard input; end with Ctrl-D", style="dim"))
        try:
            prompt = sys.stdin.read() if sys.stdin else ""  # None where the shell closed it
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not text: {error}") from error
    if not prompt.strip():
        raise UserError(
            "the prompt is empty", 'layerskip generate MODEL "some text", --prompt-file, or a pipe'
        )
    return [prompt]


def _stream(lm: LanguageModel, prompt: str, options: dict[str, Any]) -> None:
    from layerskip.decode.generation import statistics
    from layerskip.decode.options import Options

    rounds = print_rounds(lm, lm.stream(prompt, **options), options["stop"])
    prompt_tokens = sum(round.prompt_tokens for round in rounds)
    stats = statistics(rounds, lm.plan(Options.parse(options)), prompt_tokens)
    err.print(Text(statistics_line(stats), style="dim"))


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


def _chat_command(conversation: Any, command: str) -> None:
    if command == "/reset":
        conversation.reset()
        err.print(Text("forgotten", style="dim"))
    elif command == "/stats":
        last = conversation.last
        line = "nothing yet"
        if last is not None:
            computed = sum(round.prompt_tokens for round in last.rounds)
            prompt = f"prompt of {last.stats['prompt_tokens']} tokens, {computed} computed anew"
            line = f"{statistics_line(last.stats, computed)} · {prompt}"
        err.print(Text(line, style="dim"))
    else:
        err.print(Text(f"unknown command {command}: {nearest(command, ['/exit', '/reset', '/stats'])}"))


cli_measure.register(app)
cli_eval.register(app)
cli_train.register(app)
cli_distill.register(app)
cli_inspect.register(app)
cli_tune.register(app)
cli_delta.register(app)
