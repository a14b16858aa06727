"""The consoles, how loud they are, and the small things that all results are printed with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
notes = Console(stderr=True, highlight=False, soft_wrap=True)  # what is beside results and errors
BAR = 20  # characters
LINE_EVERY_S = 10.0  # a line of progress, where no terminal shows a bar
PARTS = " ▏▎▍▌▋▊▉█"


@dataclass
class Loudness:
    """What was asked for before the verb: --quiet silences `notes`, --verbose tells causes and others' warnings."""

    verbose: bool = False

    def set(self, verbose: bool, quiet: bool) -> None:
        self.verbose, notes.quiet = verbose, quiet


loudness = Loudness()


@dataclass
class Lines:
    """A `Watch` without a terminal: a line on stderr at the start of each kind of work, then one now and then."""

    clock: Callable[[], float] = time.perf_counter
    begun: set[str] = field(default_factory=set)
    told_s: float = 0.0

    def __call__(self, what: str, done: int, of: int) -> None:
        if what in self.begun and self.clock() - self.told_s < LINE_EVERY_S:
            return
        self.begun.add(what)
        self.told_s = self.clock()
        note(what + (f": {done:,} of {of:,}" if of else f": {done:,}" if done else ""))


def tell(result: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    """Print a result: one line of JSON for machines, else as `show` does."""
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        show(result)


def note(text: str, style: str = "dim") -> None:
    """Say on stderr what is beside the result."""
    notes.print(Text(text, style=style))


def rate(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:.1f} tokens/s"


def share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def bar(share: float | None, width: int = BAR) -> str:
    """Draw a share as a bar of eighths of characters."""
    eighths = round((share or 0.0) * width * 8)
    return (PARTS[8] * (eighths // 8) + PARTS[eighths % 8].strip()).ljust(width)
