"""How tables in Markdown are laid out, and how figures of result files are worded in them.

    lines = cells.head("model", "speed-up")
    lines.append(cells.line("tiny", cells.ratio({"ratio": 1.2, "ci95": [1.1, 1.3]})))

A figure that was not measured, None, is an empty cell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def head(*cells: str) -> list[str]:
    return [line(*cells), "| --- " * len(cells) + "|"]


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def ratio(figures: dict[str, Any] | None) -> str:
    """A speed-up and its interval."""
    if figures is None:
        return ""
    middle = figures["median"] if "median" in figures else figures["ratio"]
    return "{:.2f} x [{:.2f}, {:.2f}]".format(middle, *figures["ci95"])


def away(found: dict[str, Any] | None, unit: str) -> str:
    """A difference and its interval, in percent or points."""
    if found is None:
        return ""
    low, high = (100 * end for end in found["ci95"])
    return f"{100 * found['mean']:+.1f}{unit} [{low:+.1f}, {high:+.1f}]"


def machine(told: dict[str, Any]) -> str:
    """What a configuration says of the arithmetic and the processor."""
    return f"{told['dtype']}, {told['threads']} threads of an {told['device_name']}"


def link(path: Path, words: str = "") -> str:
    return f"[{words or path.name}](benchmarks/results/{path.name})"
