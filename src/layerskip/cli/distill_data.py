"""The verb distill-data: a model's own continuations, written as data to train its exits on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from layerskip.cli.app import AsJson, Loading, Model, Sampling, load, merged, verb
from layerskip.cli.options import default, only, worded
from layerskip.cli.prompts import PromptOptions, Separator, encoded, unescaped
from layerskip.cli.show.terminal import Lines, err, note, notes, out, tell
from layerskip.errors import UserError, hint_of
from layerskip.option import Option
from layerskip.reading import parsed

if TYPE_CHECKING:
    from layerskip.decode.generation import Generation

Prompt = str | list[dict[str, str]]


@verb
def distill_data(
    model: Model,
    prompts: Annotated[list[Path], Option("JSON lines with prompt or messages, also .gz; may be repeated.")],
    output: Annotated[Path, Option("A .jsonl file; one that is there is continued.")],
    sampling: Annotated[
        Sampling,
        only("max_new_tokens", "temperature", "top_k", "top_p", "seed", "batch_size", "chat"),
        default(seed=0),  # a run that goes on must draw as it began
        worded("batch_size", flags=("--batch",)),
        worded("chat", help="Wrap text prompts as messages."),
    ],
    first: Annotated[PromptOptions, only("limit")],
    loading: Loading,
    states: Annotated[
        bool,
        Option("Keep the last layer's states beside it, for `train exit-adapter`; 2 x width bytes a token."),
    ] = False,
    column: Annotated[str | None, Option("Column of the prompts.", shown="prompt or messages")] = None,
    separator: Separator = "\\n",
    as_json: AsJson = False,
) -> None:
    """Write a model's own continuations of prompts as training data; run again to go on where it stopped.

    layerskip distill-data smollm2-135m --prompts prompts.jsonl --output own.jsonl --max-new-tokens 256
    """
    from layerskip.checkpoint.facts import fingerprint
    from layerskip.measure.lines import read_prompts
    from layerskip.train.data.states import SUFFIX, StatesFile, made_by

    options = merged(sampling, chat=False) | {"states": states}  # wrapped here already; a slip costs no time
    if output.suffix != ".jsonl":
        raise UserError(f"{output} is not named .jsonl", "the data are JSON lines: --output own.jsonl")
    lines = [line for path in prompts for line in read_prompts(path, column)][: first.limit]
    given = [_to_continue(line.content, number) for number, line in enumerate(lines, 1)]
    found = _found(output)
    lm = load(model, loading)
    if lm.tokenizer is None:
        raise UserError(f"{model} has no tokenizer, so it cannot read prompts", "add its tokenizer.json")
    if lm.has_template if sampling.chat is None else sampling.chat:
        given = [_as_messages(prompt) for prompt in given]
    after = unescaped(separator)
    settings = {name: options[name] for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    settings |= {"separator": after, "dtype": str(lm.stack.dtype), "quantize": loading.quantize}
    settings |= {"weights": fingerprint(lm.path)} | ({"states": True} if states else {})
    _check_found(found, given, settings, output)
    left = [index for index in range(len(given)) if index not in found]
    tokens_of = [encoded(lm, given[index], False, after) for index in left]
    began = time.perf_counter()
    record: dict[str, Any] = {
        "output": str(output),
        "prompts": len(given),
        "found": len(given) - len(left),  # by an earlier run
        "written": 0,
        "ended": 0,
        "new_tokens": 0,
        "interrupted": False,
    }
    try:
        made = made_by(settings["weights"], lm.stack.dtype, loading.quantize)
        with (
            output.open("a", encoding="utf-8", newline="\n") as file,
            StatesFile(output.with_suffix(SUFFIX), found.values(), made) if states else nullcontext() as kept,
            _bar(record) as advance,
        ):
            results = lm.each(tokens_of, indices=left, **options)
            for index, tokens, result in zip(left, tokens_of, results, strict=True):
                result.checked()
                begins = not found and not record["written"]
                more = {} if lines[index].id is None else {"id": lines[index].id}
                more |= {"settings": settings} if begins else {}
                if kept is not None and result.states is not None:
                    more["states"] = kept.append(result.states)
                file.write(_line(index, given[index], tokens, result, more) + "\n")
                file.flush()
                record["written"] += 1
                record["ended"] += result.finish_reason == "eos"
                record["new_tokens"] += len(result.tokens)
                advance()
    except KeyboardInterrupt:
        record["interrupted"] = True
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}", hint_of(error, "give another --output")) from error
    record["seconds"] = time.perf_counter() - began
    tell(record, as_json, _show)
    if record["interrupted"]:
        sys.exit(130)


# -- prompts and lines ---------------------------------------------------------------------------------------


def _to_continue(content: Prompt, number: int) -> Prompt:
    """Leave out the answer a conversation ends with: the model writes its own."""
    if isinstance(content, str):
        return content
    messages = list(content)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise UserError(f"prompt {number} has nothing to answer", "a conversation needs a user's message")
    return messages


def _as_messages(prompt: Prompt) -> Prompt:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _line(index: int, prompt: Prompt, tokens: list[int], result: Generation, more: dict[str, Any]) -> str:
    """Phrase a training example: its text for people, and the very tokens seen and written.

    The text alone would not do: a model may write a text in other tokens than the tokenizer would, and whether it
    ended with its end token, or its budget ended it, does not show. `more` is the prompt's own id and, in
    the first line, the settings of all.
    """
    if isinstance(prompt, str):
        told: dict[str, Any] = {"prompt": prompt, "completion": result.text}
    else:
        told = {"messages": [*prompt, {"role": "assistant", "content": result.text}]}
    told |= {
        "index": index,
        "finish_reason": result.finish_reason,
        "input_ids": tokens + result.tokens,
        "completion_mask": [0] * len(tokens) + [1] * len(result.tokens),
    }
    return json.dumps(told | more, ensure_ascii=False, separators=(",", ":"))


# -- going on ------------------------------------------------------------------------------------------------


def _found(output: Path) -> dict[int, dict[str, Any]]:
    """Read what an earlier run has written, after cutting off the half line a killed one leaves."""
    try:
        if not output.exists():
            output.parent.mkdir(parents=True, exist_ok=True)
            return {}
        content = output.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = [parsed(line, str(output)) for line in whole.decode("utf-8").split("\n")[:-1]]
        found = {line["index"]: line for line in lines}
        if len(whole) < len(content):
            with output.open("rb+") as file:
                file.truncate(len(whole))
    except OSError as error:
        raise UserError(f"cannot use {output}: {error}", hint_of(error, "give another --output")) from error
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{output} was not written by distill-data", "give another --output, or remove it"
        ) from error
    return found


def _check_found(
    found: dict[int, dict[str, Any]], given: list[Prompt], settings: dict[str, Any], output: Path
) -> None:
    before = next((line["settings"] for line in found.values() if "settings" in line), settings)
    if changed := [key for key in settings if before.get(key) != settings[key]]:
        raise UserError(
            f"{output} was made with other settings: {', '.join(changed)} differ",
            "give those of its first run, another --output, or remove it",
        )
    for index, line in found.items():
        prompt = line["messages"][:-1] if "messages" in line else line.get("prompt")
        if index < len(given) and prompt != given[index]:  # more than now: an earlier run had a greater limit
            raise UserError(
                f"{output} was made from other prompts: number {index + 1} differs",
                "give another --output, or remove it",
            )


@contextmanager
def _bar(record: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Show on stderr how far the work is: a bar on a terminal, else a line now and then."""
    if not notes.is_terminal:
        lines = Lines()
        yield lambda: lines("writing", record["found"] + record["written"], record["prompts"])
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    began = time.perf_counter()
    with Progress(*columns, *times, console=notes, transient=True) as bars:
        task = bars.add_task("writing", total=record["prompts"], completed=record["found"])

        def advance() -> None:
            pace = record["new_tokens"] / (time.perf_counter() - began)
            bars.update(task, advance=1, description=f"writing, {pace:.0f} tokens/s")

        yield advance


def _show(record: dict[str, Any]) -> None:
    whole = record["found"] + record["written"]
    told = f"{record['output']}: {whole} of {record['prompts']} prompts"
    told += f", {record['written']} now ({record['new_tokens']} tokens, {record['ended']} ended by the model)"
    (err if record["interrupted"] else out).print(Text(told))
    if record["interrupted"]:
        note("stopped; run the same command again to go on")
