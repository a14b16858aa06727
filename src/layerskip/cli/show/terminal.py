"""The consoles, how loud they are, and the small things that all results are printed with."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

# What acts on a terminal instead of standing on it: C0 and C1 codes but tab, line break and its \r, delete, half
# characters, and what turns the direction of writing.
_CODES = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n|\\Z)"
)


def visible(text: str) -> str:
    """Spell control characters, so that text from files or models cannot act on a terminal."""
    return _CODES.sub(lambda found: ascii(found[0])[1:-1], text)


class _Console(Console):
    """Print text of any origin as text; a model's own reaches a pipe or file as it is."""

    def render(self, *arguments: Any, **keywords: Any) -> Iterable[Segment]:
        for part in super().render(*arguments, **keywords):
            raw = part.control or not (self.stderr or self.is_terminal)
            yield part if raw else Segment(visible(part.text), part.style)


out, err = _Console(highlight=False, soft_wrap=True), _Console(stderr=True, highlight=False, soft_wrap=True)
notes = _Console(stderr=True, highlight=False, soft_wrap=True)  # what is beside results and errors
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
