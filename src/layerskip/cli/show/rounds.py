"""How a generation looks: text as it comes, drafted and kept text coloured, and a line of statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.segment import Segment, Segments
from rich.style import Style

from layerskip.cli.show.terminal import out, rate, share
from layerskip.errors import UserError

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel

KEPT = {"exit": "green", "lookup": "cyan"}  # drafted and kept, by who drafted


def print_rounds(lm: LanguageModel, rounds: Iterable[Any], stop: Any) -> list[Any]:
    """Print rounds as they come: drafted and kept text coloured by who drafted it, the model's own token plain."""
    from layerskip.decode.text import TextStream

    if lm.tokenizer is None:
        raise UserError("this folder has no tokenizer, so text cannot be shown", "use token ids from Python")
    stream, seen = TextStream(lm.tokenizer, stop), []
    try:
        for round in rounds:
            seen.append(round)
            show(stream.push(round.tokens[: round.accepted]), KEPT.get(round.source, "green"))
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
        for source, own in stats["by_source"].items():
            kept = share(own["accepted"] / own["drafted"]) if own["drafted"] else "-"
            setting = f" E {stats['exit_layer']}, K {stats['draft_length']}" if source == "exit" else ""
            parts.append(f"{source}{'' if stats['policy'] == 'adaptive' else setting} {kept} kept")
        parts.append(f"{stats['tokens_per_round']:.2f} tokens/round")
    if stats.get("seed") is not None:
        parts.append(f"seed {stats['seed']}")
    return " · ".join(parts)
