"""The two consoles, and the small things that all results are printed with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
BAR = 20  # characters
PARTS = " ▏▎▍▌▋▊▉█"


def tell(result: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    """Print a result: one line of JSON for machines, else as `show` does."""
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        show(result)


def note(text: str, style: str = "dim") -> None:
    """Say on stderr what is beside the result."""
    err.print(Text(text, style=style))


def rate(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:.1f} tokens/s"


def share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def bar(share: float | None, width: int = BAR) -> str:
    """Draw a share as a bar of eighths of characters."""
    eighths = round((share or 0.0) * width * 8)
    return (PARTS[8] * (eighths // 8) + PARTS[eighths % 8].strip()).ljust(width)
