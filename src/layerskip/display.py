"""How results look in a terminal: coloured rounds, a line of statistics, the demo's table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from layerskip.errors import UserError

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel
    from layerskip.demo import Contest

out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
KEPT = "green"  # drafted and kept


def print_rounds(lm: LanguageModel, rounds: Iterable[Any], stop: Any) -> list[Any]:
    """Print rounds as they come: drafted and kept text coloured, the model's own token plain."""
    from layerskip.decode.text import TextStream

    if lm.tokenizer is None:
        raise UserError("this folder has no tokenizer, so text cannot be shown", "use token ids from Python")
    stream, seen = TextStream(lm.tokenizer, stop), []
    try:
        for round in rounds:
            seen.append(round)
            show(stream.push(round.tokens[: round.accepted]), KEPT)
            show(stream.push(round.tokens[round.accepted :]))
    finally:
        show(stream.finish() + "\n")
    return seen


def show(text: str, style: str | None = None) -> None:
    """Write a model's text as it is: rich's `Text` would turn its tabs into spaces and drop carriage returns."""
    out.print(Segments([Segment(text, Style.parse(style) if style else None)]))


def statistics_line(stats: dict[str, Any], prefilled: int | None = None) -> str:
    """Sum up a generation in a line; prefill and decode apart. `prefilled`: prompt tokens computed, if not all."""
    prefilled = stats["prompt_tokens"] if prefilled is None else prefilled
    prefill = prefilled / stats["prefill_s"] if stats["prefill_s"] else None
    parts = [
        f"{stats['mode']}: {stats['new_tokens']} tokens",
        f"prefill {rate(prefill)}",
        f"decode {rate(stats['decode_tokens_per_s'])}",
    ]
    if stats["mode"] == "early-exit":
        parts.append(f"E {stats['exit_layer']}, not verified")
    if stats["drafted"]:
        parts.append(f"E {stats['exit_layer']}, K {stats['draft_length']}")
        parts.append(f"acceptance {share(stats['acceptance'])}")
        parts.append(f"{stats['tokens_per_round']:.2f} tokens/round")
    return " · ".join(parts)


def rate(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:.1f} tokens/s"


def share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def print_contests(model: str, lm: LanguageModel, results: Sequence[Contest]) -> None:
    """Print the demo's verdict: equality first, then the speeds, then what they mean."""
    equal = sum(contest.equal for contest in results)
    verdict = f"\nequality: {equal} of {len(results)} outputs are token for token those of plain decoding"
    out.print(Text(verdict, style="bold green" if equal == len(results) else "bold red"))
    table = Table("prompt", "plain", "self-speculative", "acceptance", "tokens/round", "speed-up", box=None)
    for c in results:
        plain, own = c.plain.stats, c.speculative.stats
        table.add_row(
            c.task,
            rate(plain["decode_tokens_per_s"]),
            rate(own["decode_tokens_per_s"]),
            share(own["acceptance"]),
            f"{own['tokens_per_round'] or 0:.2f}",
            f"{c.speedup:.2f} x" if c.equal else "not equal",
        )
    out.print(table)
    plan = results[0].speculative.stats
    settings = f"E = {plan['exit_layer']} of {lm.stack.num_layers} layers, K = {plan['draft_length']}"
    dtype = str(lm.stack.dtype).removeprefix("torch.")
    out.print(Text(f"{settings}, greedy, {dtype} on {lm.stack.device}", style="dim"))
    if not lm.facts.trained:
        out.print(
            Text(
                f"{model} has no trained exits yet: its early layers were never taught to predict, so most drafts "
                "are rejected and self-speculation is slower than plain decoding here. What this shows is that "
                "the output is the same nevertheless.",
                style="yellow",
            )
        )
