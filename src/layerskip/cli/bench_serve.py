"""The verb bench-serve: how fast a server answers under a bounded load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from layerskip.cli.app import AsJson, verb
from layerskip.cli.results import progress
from layerskip.cli.show.terminal import out, tell
from layerskip.errors import UserError
from layerskip.option import Option
from layerskip.serve.load import Target, measured
from layerskip.serve.settings import KEY, read_key


@verb
def bench_serve(
    url: Annotated[str, typer.Argument(help="Address of a server, such as http://127.0.0.1:8000.")],
    requests: Annotated[int, Option("Requests in all.", least=1)] = 64,
    at_once: Annotated[int, Option("Requests under way at a time.", least=1, most=512)] = 8,
    max_tokens: Annotated[int, Option("Tokens of an answer at most.", least=1)] = 128,
    temperature: Annotated[float, Option("0 is greedy.", least=0, most=2)] = 0.0,
    prompts: Annotated[
        Path | None, Option("JSON lines with prompt or messages.", shown="the package's own")
    ] = None,
    model: Annotated[str | None, Option("Model to ask for.", shown="the server's first")] = None,
    api_key_file: Annotated[Path | None, Option(f"File with the server's key; or {KEY}.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure any server that speaks OpenAI's interface: time to first token, per token, throughput, errors.

    layerskip bench-serve http://127.0.0.1:8000 --requests 64 --at-once 8
    """
    from layerskip.measure import prompt_file
    from layerskip.measure.lines import read_prompts

    lines = [line.content for line in read_prompts(prompts or prompt_file())]
    if not lines:
        raise UserError(f"{prompts} has no prompts", 'give a line such as {"prompt": "Hello"}')
    with progress() as watch:
        told, _ = measured(
            Target(url, read_key(api_key_file), model),
            lines,
            requests,
            at_once,
            max_tokens,
            watch,
            temperature=temperature,
        )
    tell(told, as_json, _show)
    if told["failed"]:
        raise typer.Exit(1)


def _show(told: dict[str, Any]) -> None:
    out.print(
        f"{told['model']}: {told['requests']} requests, {told['at_once']} at a time, {told['failed']} failed, "
        f"{told['seconds']:.1f} s"
    )
    out.print(f"  {told['tokens_per_s']:.1f} tokens/s, {told['requests_per_s']:.2f} requests/s")
    for name, what in (
        ("first_s", "time to first token"),
        ("each_s", "time per token"),
        ("whole_s", "whole answer"),
    ):
        if told[name] is not None:
            values = "  ".join(f"{p} {1000 * value:.1f} ms" for p, value in told[name].items())
            out.print(f"  {what}: {values}")
    if told["acceptance"] is not None:
        out.print(f"  drafts kept: {100 * told['acceptance']:.0f}%")
    for error, count in told["errors"].items():
        out.print(f"  {count} x {error}")
