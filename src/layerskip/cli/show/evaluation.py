"""How an evaluation looks: a table of exits per source, and tasks with one line per way of doing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from layerskip.cli.show.terminal import bar, out

TITLES = {
    "text": "running text",
    "prompts": "prompts",
    "continuations": "the model's own continuations",
}
SHARES = ("score", "acceptance", "normalised_match", "greedy", "accuracy", "accuracy_per_character")


def print_evaluation(result: dict[str, Any]) -> None:
    """Print exits per source and tasks, then what they were measured with."""
    told = result["configuration"]
    for source, rows in result["sources"].items():
        print_exits(TITLES[source], rows, told["trained_exits"])
    for name, task in result["tasks"].items():
        print_task(name, task)
    for exit_layer, size in told.get("own_heads", {}).items() if result["sources"] else ():
        head = f"exit {exit_layer} is read by its own draft head of {size:,} tokens"
        why = "no other token has a probability there, so KL and perplexity are infinite"
        out.print(Text(f"{head}; {why}", style="dim"))
    trained = ", ".join(map(str, told["trained_exits"]))
    marks = f"exits trained: {trained}" if trained else "this model has no trained exits"
    out.print(Text(f"{told['model']}, {told['dtype']} on {told['device']}; {marks}", style="dim"))


def print_exits(title: str, rows: Sequence[dict[str, Any]], trained: Sequence[int]) -> None:
    """Print what each exit is worth on one source; exits that were trained stand out."""
    tokens = rows[0]["tokens"] if rows else 0
    out.print(Text(f"\n{title}", style="bold") + Text(f"  {tokens:,} tokens predicted", style="not bold dim"))
    table = Table("exit", "agreement", "", "KL, nats", "TV", "perplexity", "", box=None)
    for column in table.columns:
        column.justify = "left" if column.header in ("", "agreement") else "right"
    for row in rows:
        last, known = row is rows[-1], row["exit_layer"] in trained
        table.add_row(
            str(row["exit_layer"]),
            bar(row["agreement"]),
            _number(row["agreement"], "{:.1%}"),
            _number(row["kl"], "{:.3f}"),
            _number(row["tv"], "{:.3f}"),
            _number(row["perplexity"], "{:,.2f}" if (row["perplexity"] or 0) < 1e5 else "{:.1e}"),
            "all layers" if last else "trained" if known else "",
            style="bold" if last else "green" if known else None,
        )
    out.print(table)


def print_task(name: str, task: dict[str, Any]) -> None:
    """Print a task: a column per mode, a line per figure that is one number."""
    told = f"  {task['items']:,} items"
    if "exit_layer" in task:
        told += f"; E {task['exit_layer']}, K {task['draft_length']}"
    out.print(Text(f"\n{name}", style="bold") + Text(told, style="not bold dim"))
    modes = task["modes"]
    table = Table("", *modes, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for key in dict.fromkeys(key for told in modes.values() for key in told):
        cells = [_figure(key, told, task["items"]) for told in modes.values()]
        if any(cells):
            label = next(told.get("metric", key) for told in modes.values()) if key == "score" else key
            table.add_row(label.replace("_", " "), *cells)
    for source in dict.fromkeys(source for told in modes.values() for source in told.get("by_source", {})):
        kept = [told.get("by_source", {}).get(source) for told in modes.values()]
        words = [f"{x['accepted']:,} of {x['drafted']:,} drafts" if x else "" for x in kept]
        table.add_row(f"from {source}", *words)
    out.print(table)


def _figure(key: str, told: dict[str, Any], items: int) -> str:
    """Word one figure of a mode; what is not one number has no line of its own."""
    value = told.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if key in SHARES:
        interval = told.get(f"{key}_ci95")
        return f"{value:.1%}" + (f" [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]" if interval else "")
    if key == "equal":
        return f"{value} of {items}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else style.format(value)
