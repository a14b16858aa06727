"""The lens and the timeline in a terminal: pure functions of their data and a width, made of rich texts.

    for line in lens_lines(seen, width=100, coloured=True):
        out.print(line)

Marks say what colours say, so nothing is lost without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from layerskip.cli.show.terminal import out
from layerskip.measure.exits.lens import visible
from layerskip.measure.exits.timeline import KINDS

if TYPE_CHECKING:
    from layerskip.measure.exits.lens import Lens
    from layerskip.measure.exits.timeline import Strip, Timeline

WIDEST = 12  # cells of a token; longer ones are cut
TOLD = 10  # exits named in a line
SETTLED, AGREES, DIFFERS = "┃", ":", " "
# Blue where an exit says what the full model says, else orange, more of it the more probable: (least, colours).
SHADES = [
    (0.8, "#ffffff on #08519c", "#ffffff on #a63603"),
    (0.5, "#ffffff on #3182bd", "#000000 on #e6550d"),
    (0.2, "#000000 on #9ecae1", "#000000 on #fdae6b"),
    (0.0, "#000000 on #eff3ff", "#000000 on #feedde"),
]
MARKS = {"kept": "", "rejected": "×", "dropped": "×", "correction": "+", "bonus": "+", "plain": "+"}
STYLES = {
    "kept": "green", "rejected": "red strike", "dropped": "bright_black strike", "correction": "bold",
    "bonus": "bold", "plain": "bold",
}  # fmt: skip


def print_inspection(seen: Lens, shown: Timeline | None) -> None:
    """Print the lens, and the rounds if there were some."""
    coloured = out.color_system is not None and not out.no_color
    for line in lens_lines(seen, out.width, coloured):
        out.print(line)
    out.print(Text(settle_line(seen)))
    if shown is not None:
        out.print()
        for line in timeline_lines(shown, out.width):
            out.print(line)


def lens_lines(lens: Lens, width: int, coloured: bool) -> Iterator[Text]:
    """Draw layers x positions, the last layer on top, in blocks as wide as fit.

    Without colours a digit stands behind each token, the tenths of its probability.
    """
    tail = len(_tail(0.0, coloured))
    longest = max(cell_len(visible(token)) for row in (*lens.top, lens.read) for token in row)
    room = max(4, min(WIDEST, longest))
    per_block = max(1, (width - 8) // (room + 1 + tail))
    for start in range(0, len(lens.read), per_block):
        columns = range(start, min(start + per_block, len(lens.read)))
        yield from _block(lens, columns, room, coloured)
        yield Text()
    probable = "darker is more probable" if coloured else "digit: probability in tenths"
    yield Text(
        f"{SETTLED} the full model's token from here up, {AGREES} the full model's token but not above; {probable}",
        style="dim",
    )


def _block(lens: Lens, columns: range, room: int, coloured: bool) -> Iterator[Text]:
    for i in range(len(lens.exits) - 1, -1, -1):
        line = Text.assemble((f"{lens.exits[i]:>7} ", "dim"))
        for t in columns:
            same, probability = lens.agrees[i][t], lens.probability[i][t]
            mark = SETTLED if lens.exits[i] >= lens.settles[t] else AGREES if same else DIFFERS
            token = fitted(lens.top[i][t], room)
            style = next(blue if same else orange for least, blue, orange in SHADES if probability >= least)
            line.append(mark, "bold")
            line.append(token, style if coloured else None)
            line.append(_tail(probability, coloured))
        if not coloured:  # a coloured cell is as wide as its neighbours
            line.rstrip()
        yield line
    gap = " " * len(_tail(0.0, coloured))
    for name, cells in (
        ("reads", [fitted(lens.read[t], room) for t in columns]),
        ("settles", [f"{lens.settles[t]:<{room}}" for t in columns]),
    ):
        yield Text((f"{name:>7} " + "".join(f" {cell}{gap}" for cell in cells)).rstrip(), style="bold")


def _tail(probability: float, coloured: bool) -> str:
    return " " if coloured else f" {min(9, int(10 * probability))} "


def settle_line(lens: Lens) -> str:
    """Say in a line how early tokens are settled, and how often exits agree: a few of them, evenly spread."""
    layers = sorted(lens.settles)
    known = list(zip(lens.exits, lens.agreement, strict=True))
    told = ", ".join(f"{k}: {100 * share:.0f}%" for k, share in known[:: -max(1, len(known) // TOLD)][::-1])
    half = (
        f"half of {len(layers)} tokens are settled by layer {layers[(len(layers) - 1) // 2]} of {lens.layers}"
    )
    return f"{half} · agreement by exit {told}"


def fitted(token: str, room: int) -> str:
    """Make a token visible and exactly `room` cells wide; … marks a cut."""
    shown = visible(token)
    return set_cell_size(shown, room) if cell_len(shown) <= room else set_cell_size(shown, room - 1) + "…"


def timeline_lines(timeline: Timeline, width: int) -> Iterator[Text]:
    """Draw a line per round, wrapped under its first token where it is long; marks say what colours say."""
    yield Text("round   E   K  kept  tokens", style="dim")
    number = 0
    for strip in timeline.strips:
        decodes = strip.source != "prefill"
        number += decodes
        yield from _strip_lines(strip, f"{number:>5}" if decodes else "     ", width)
    yield Text("× drafted in vain, + the full model's own token, no mark: drafted and kept", style="dim")
    yield Text(timeline.summary())


def _strip_lines(strip: Strip, number: str, width: int) -> Iterator[Text]:
    drafted = strip.count("kept", "rejected", "dropped")
    decodes = strip.source != "prefill"
    who = "copy" if strip.source == "lookup" else f"{strip.exit_layer:>3} "
    shape = f"{who}{strip.draft_length:>3}" if decodes else "prompt "
    kept = f"{strip.count('kept')}/{drafted}" if drafted else "-"
    line, indent = Text.assemble((f"{number} {shape} {kept:>5}  ", "dim")), " " * 21
    used = cell_len(line.plain)
    for kind, token in strip.cells:
        cell = MARKS[kind] + visible(token)
        if used + cell_len(cell) + 1 > width and used > len(indent):
            line.rstrip()
            yield line
            line, used = Text(indent), len(indent)
        line.append(cell, STYLES[kind])
        line.append(" ")
        used += cell_len(cell) + 1
    line.rstrip()
    yield line


assert MARKS.keys() == STYLES.keys() == KINDS.keys()
