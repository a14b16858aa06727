"""Figures of result files, as PNG: what exits are worth, what speed-ups they give, the lens, the timeline.

    draw.exits({"untrained": result, "trained": other}, Path("exits.png"))      # results of `layerskip eval`
    draw.lens(seen, Path("lens.png"), "SmolLM2-135M")

Functions take what was measured as plain data, write the file and return it. Raises: UserError without matplotlib,
or where it cannot be written. Blue is good, orange is not: signs or numbers say what a colour says as well.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.errors import UserError
from layerskip.measure.exits.canvas import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    below,
    canvas,
    cut,
    dress,
    legend,
    name_lines,
    say,
    signs,
    written,
)
from layerskip.measure.exits.lens import visible
from layerskip.measure.exits.timeline import COMMITTED, KINDS

if TYPE_CHECKING:
    from layerskip.measure.exits.lens import Lens
    from layerskip.measure.exits.timeline import Timeline

DASHED = (0, (2, 1.5))
SERIES = (ORANGE, BLUE, GREEN, PURPLE)  # Okabe and Ito
ENDINGS = (".png", ".svg", ".pdf")
BAND = 0.15  # of the measured speed-up: what a prediction promises
COLUMNS = 14  # positions side by side in the lens
ROWS = 16  # of a heat map, beyond which numbers do not fit
Series = Sequence[float | None]


def check(file: Path) -> None:
    """Find out whether a picture can be drawn, before the work for it. Raises: UserError."""
    if file.suffix.lower() not in ENDINGS:
        raise UserError(f"{file.name} is no picture", "--output names a .png, .svg or .pdf file")
    if not file.parent.is_dir():
        raise UserError(f"there is no folder {file.parent}", "make it first, or leave it out")
    canvas(1.0)


def exits(results: Mapping[str, Mapping[str, Any]], file: Path) -> Path:
    """Draw what each exit is worth, for one or more results of `layerskip eval`; dots are trained exits."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = canvas(4.4)
    panels = figure.subplots(1, 3)
    titles = (
        ("A draft is kept", "share of positions, %"),
        ("Distance from the full model", "KL divergence, nats per token"),
        ("Perplexity", "per token of the text"),
    )
    colours = {name: SERIES[i % len(SERIES)] for i, name in enumerate(results)}
    for name, result in results.items():
        rows = sorted(result["exits"], key=lambda row: row["exit_layer"])
        layers = [row["exit_layer"] for row in rows]
        marked = {"marker": "o", "markersize": 5, "markeredgecolor": "white"}
        marked["markevery"] = [i for i, k in enumerate(layers) if k in trained_exits(result)]
        # Not clipped: exit 0 is on the edge.
        curve = {"color": colours[name], "linewidth": 1.8, "clip_on": False, **marked}
        panels[0].plot(layers, [100 * row["agreement"] for row in rows], **curve)
        panels[0].plot(layers, [100 * (1 - row["tv"]) for row in rows], linestyle=DASHED, **curve)
        # The last layer's distance is 0, which a logarithmic axis does not have.
        panels[1].plot(
            layers, [row["kl"] if row["exit_layer"] < layers[-1] else None for row in rows], **curve
        )
        panels[2].plot(layers, [row["perplexity"] for row in rows], **curve)
    panels[0].set_ylim(0, 101)
    for panel, (title, unit) in zip(panels, titles, strict=True):
        dress(panel, title, "exit layer E", unit)
        panel.set_xlim(left=0)
    for panel in panels[1:]:
        panel.set_yscale("log")
        low, high = panel.get_ylim()
        panel.yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)),
            major_formatter=FuncFormatter(_plain_number),
            minor_formatter=NullFormatter(),
        )
    signs = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    signs += [Line2D([], [], color=GREY, label="greedy: agreement")]
    signs += [Line2D([], [], color=GREY, linestyle=DASHED, label="sampling: 1 - TV")]
    if any(map(trained_exits, results.values())):
        signs += [Line2D([], [], color=GREY, marker="o", linestyle="none", label="trained exit")]
    legend(figure, signs)
    return written(figure, file)


def trained_exits(result: Mapping[str, Any]) -> Sequence[int]:
    """The exits that were trained, by a result's configuration."""
    told = result.get("configuration", {}).get("trained_exits") or result.get("doctor", {}).get("exits")
    return told or ()


def speedup_surface(result: Mapping[str, Any], file: Path) -> Path:
    """Draw predicted and measured speed-ups over (E, K), and one against the other, from a "tuning" result.

    A cell shows the best of its draft vocabularies; a ring marks the best cell of all.
    """
    grid = [cell for cell in result["grid"] if cell.get("speedup")]
    predicted = _by_cell((cell, cell["predicted_speedup"]) for cell in result["doctor"]["surface"])
    measured = _by_cell((cell, cell["speedup"]["ratio"]) for cell in grid)
    figure = canvas(4.4)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1.25))
    shared = [*predicted.values(), *measured.values()]
    _heat(left, predicted, shared, measured)
    _heat(middle, measured, shared, measured)
    dress(left, "Predicted speed-up, x", "draft length K", "exit layer E", grid=None)
    dress(middle, "Measured speed-up, x", "draft length K", "", grid=None)
    points = [
        (cell["predicted_speedup"], cell["speedup"]["ratio"], *cell["speedup"]["ci95"]) for cell in grid
    ]
    ends = [end for point in points for end in point] or [0.5, 1.5]
    span = (0.92 * min(ends), 1.06 * max(ends))
    band = [[end / (1 + BAND) for end in span], [end / (1 - BAND) for end in span]]
    right.fill_between(span, *band, color="#ececec", linewidth=0)
    right.plot(span, span, color=GREY, linewidth=1)
    for guess, median, least, most in points:
        inside = abs(guess / median - 1) <= BAND
        around = [[max(0.0, median - least)], [max(0.0, most - median)]]
        sign = {"fmt": "o", "color": BLUE} if inside else {"fmt": "X", "color": ORANGE}
        right.errorbar(guess, median, yerr=around, markersize=5, elinewidth=1, **sign)
    right.set(xlim=span, ylim=span, aspect="equal")
    title = f"Grey: prediction within {100 * BAND:.0f}%"
    dress(right, title, "predicted speed-up, x", "measured speed-up, x, 95% interval", grid=None)
    return written(figure, file)


def bars(
    groups: Mapping[str, Mapping[str, Mapping[str, Any] | None]], file: Path, title: str, axis: str, note: str
) -> Path:
    """Draw values as bars: by group, then by name, `{"ratio": ..., "ci95": ...}` (or no interval), or None."""
    figure = canvas(3.8)
    panel = figure.subplots()
    names = dict.fromkeys(name for group in groups.values() for name in group)
    colours = dict(zip(SERIES, names, strict=False))
    size = min(8.5, 220 / (len(groups) * len(colours)))  # of numbers as wide as their bars
    for place, (colour, name) in enumerate(colours.items()):
        for at, told in ((at, group.get(name)) for at, group in enumerate(groups.values())):
            if told is not None:
                x, ratio = at + 0.8 * ((place + 0.5) / len(colours) - 0.5), told["ratio"]
                low, high = told.get("ci95", (ratio, ratio))
                away = [[max(0.0, ratio - low)], [max(0.0, high - ratio)]]
                panel.bar(x, ratio, 0.74 / len(colours), yerr=away, color=colour, ecolor=GREY, capsize=3)
                panel.text(x, 0.03, f"{ratio:.2f}", color="white", ha="center", fontsize=size)
    panel.axhline(1.0, color="black", linewidth=1)
    panel.set(xticks=range(len(groups)), xticklabels=list(groups), xmargin=0.01)
    dress(panel, title, "", axis)
    legend(figure, signs(colours, note))
    return written(figure, file)


def acceptance(series: Mapping[str, Mapping[int, Series]], file: Path) -> Path:
    """Draw the share of drafts kept at each place of a draft: a panel per name, a line per exit layer."""
    from matplotlib import colormaps

    figure = canvas(3.8)
    panels = figure.subplots(1, len(series), sharey=True, squeeze=False)[0]
    for panel, (name, by_exit) in zip(panels, series.items(), strict=True):
        ends = []
        for i, exit_layer in enumerate(sorted(by_exit)):
            # Viridis keeps its order of lightness for every kind of colour vision; lines carry names as well.
            colour = colormaps["viridis"](0.8 - 0.7 * i / max(1, len(by_exit) - 1))
            shares = enumerate(by_exit[exit_layer], 1)
            known = [(place, 100 * share) for place, share in shares if share is not None]
            if known:
                panel.plot(*zip(*known, strict=True), "o-", color=colour, markersize=3.5, linewidth=1.8)
                ends.append((known[-1][1], f"E = {exit_layer}", colour))
        longest = max((len(shares) for shares in by_exit.values()), default=1)
        panel.set(xlim=(0.8, max(2, longest) + 0.1), ylim=(0, 101), xticks=range(1, longest + 1))
        dress(
            panel, name, "place in the draft", "" if panel is not panels[0] else "drafts kept up to here, %"
        )
        name_lines(panel, ends)
    return written(figure, file)


def lens(seen: Lens, file: Path, title: str) -> Path:
    """Draw layers x positions, the last layer on top; above the black line a token is settled."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    count, rows = len(seen.read), len(seen.exits)
    width = -(-count // -(-count // COLUMNS))  # blocks as equal as may be
    blocks = [range(start, min(start + width, count)) for start in range(0, count, width)]
    columns = max(width, 6)
    figure = canvas(0.75 + len(blocks) * (0.195 * rows + 0.5))
    panels = figure.subplots(len(blocks), 1, squeeze=False)[:, 0]
    blue, orange = (LinearSegmentedColormap.from_list("", ["#ffffff", colour]) for colour in (BLUE, ORANGE))
    room = 116 // columns  # characters that fit a cell
    for panel, block in zip(panels, blocks, strict=True):
        shades = np.ones((rows, columns, 4))  # columns that a block lacks stay white
        for i in range(rows):
            for x, t in enumerate(block):
                p = seen.probability[i][t]
                shades[i, x] = (blue if seen.agrees[i][t] else orange)(0.06 + 0.94 * p)
                say(panel, x, i, cut(visible(seen.top[i][t]), room), "white" if p > 0.6 else "black")
        panel.imshow(shades, aspect="auto", origin="lower", interpolation="nearest")
        # Under the first row drawn from which on all exits agree; rows between may have been left out.
        floors = [next(i for i, k in enumerate(seen.exits) if k >= seen.settles[t]) - 0.5 for t in block]
        sides = [x - 0.5 for x in range(len(block) + 1)]
        panel.stairs(floors, sides, baseline=None, color="black", linewidth=1.8, zorder=3, clip_on=False)
        panel.vlines(sides, -0.5, rows - 0.5, color="white", linewidth=0.8, zorder=1)
        panel.set_xticks([])
        panel.set_yticks(range(rows), [str(k) for k in seen.exits], fontsize=7.5)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_ylabel("exit layer E", fontsize=9)
        for x, t in enumerate(block):
            below(
                panel,
                x,
                cut(visible(seen.read[t]), room),
                str(seen.settles[t]),
                ha="center",
                family="monospace",
            )
        below(panel, -0.55, "reads", "settles", ha="right", color=GREY)
    panels[0].set_title(title, loc="left", fontsize=11, parse_math=False)
    colours = {BLUE: "the full model's next token", ORANGE: "another token", "black": "settled from here up"}
    legend(figure, signs(colours, "darker is more probable"))
    return written(figure, file)


FILLS = {
    "kept": "#9ecae1", "rejected": "#f4a582", "dropped": "#f0f0f0", "correction": "white", "bonus": "white",
    "plain": "white",
}  # fmt: skip


def timeline(shown: Timeline, file: Path, title: str) -> Path:
    """Draw a row per round: drafts kept, rejected and dropped, the full model's own token; E, K and the yield."""
    from matplotlib.patches import Rectangle

    widest = max(len(strip.cells) for strip in shown.strips)
    columns = max(widest, 6)
    figure = canvas(1.1 + 0.235 * len(shown.strips))
    panel, labels = figure.subplots(), []
    room = 90 // columns
    for y, strip in enumerate(shown.strips):
        for x, (kind, token) in enumerate(strip.cells):
            edge = "black" if kind in ("correction", "bonus", "plain") else "none"
            panel.add_patch(
                Rectangle((x + 0.02, y - 0.42), 0.96, 0.84, facecolor=FILLS[kind], edgecolor=edge)
            )
            text = cut(("× " if kind == "rejected" else "") + visible(token), room)
            say(panel, x + 0.5, y, text, "#888888" if kind == "dropped" else "black")
        if strip.source == "prefill":
            labels.append("prompt" + " " * 12)
        else:
            number = 1 + sum(label.strip() != "prompt" for label in labels)
            who = "copy" if strip.source == "lookup" else f"E {strip.exit_layer:>2}"
            labels.append(f"{number}  {who}  K {strip.draft_length:>2}")
        made = strip.count(*COMMITTED)
        panel.text(widest + 0.1, y, f"{made} token{'s' * (made > 1)}", va="center", fontsize=8, color=GREY)
    panel.set(xlim=(0, columns + 0.9), ylim=(len(shown.strips) - 0.4, -0.6))
    panel.set_xticks([])
    panel.set_yticks(range(len(labels)), labels, fontsize=8, family="monospace")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set_title(f"{title}\n{shown.summary()}", loc="left", fontsize=11, parse_math=False)
    told = {kind: KINDS[kind] for kind in ("kept", "rejected", "dropped")}
    legend(
        figure,
        signs({**{FILLS[kind]: name for kind, name in told.items()}, "white": "the full model's own token"}),
    )
    return written(figure, file)


def front(points: Mapping[int, tuple[float, float]], best: Sequence[int], most: float, file: Path) -> Path:
    """Draw trials of a search, number -> (cost in %, speed-up): a line joins those that no other beats in both."""
    figure = canvas(3.8)
    panel = figure.subplots()
    for number, (cost, speedup) in points.items():
        panel.plot(cost, speedup, "o", color=BLUE if number in best else GREY, markersize=7)
        panel.annotate(str(number), (cost, speedup), (5, 4), textcoords="offset points", fontsize=8)
    panel.step(
        *zip(*(points[number] for number in best), strict=True), where="post", color=BLUE, linewidth=1.2
    )
    panel.axvline(most, color=ORANGE, linestyle=DASHED, linewidth=1.2)
    dress(panel, "Trials of the search", "cost: perplexity of the whole model, %", "predicted speed-up, x")
    names = {BLUE: "no other is faster and cheaper", GREY: "others", ORANGE: "the cost allowed"}
    legend(figure, signs(names))
    return written(figure, file)


def headline(model: str, text: str) -> str:
    """Name the model and what it read."""
    return f"{model} reads “{cut(''.join(c if c == ' ' else visible(c) for c in text), 90)}”"


def _plain_number(value: float, _: int) -> str:
    return f"{value:g}" if value < 1e5 else f"$10^{{{math.log10(value):.0f}}}$"


def _by_cell(rated: Iterable[tuple[Mapping[str, Any], float]]) -> dict[tuple[int, int], float]:
    """Keep the best figure of each (E, K)."""
    best: dict[tuple[int, int], float] = {}
    for cell, value in rated:
        place = (cell["exit_layer"], cell["draft_length"])
        best[place] = max(value, best.get(place, value))
    return best


def _heat(
    panel: Any,
    cells: Mapping[tuple[int, int], float],
    scale: Sequence[float],
    numbered: Collection[tuple[int, int]],
) -> None:
    """Draw figures over (E, K), white at 1; numbers stand in all cells, or in `numbered` where rows are too low."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
    from matplotlib.patches import Rectangle

    layers, lengths = (sorted({place[i] for place in cells}) for i in (0, 1))
    best = max(cells, key=lambda place: cells[place])
    colours = LinearSegmentedColormap.from_list("", [ORANGE, "#f7f7f7", BLUE])
    norm = TwoSlopeNorm(1.0, min(0.9, *scale), max(1.1, *scale))
    values = np.full((len(layers), len(lengths)), np.nan)
    for (exit_layer, draft_length), value in cells.items():
        y, x = layers.index(exit_layer), lengths.index(draft_length)
        values[y, x] = value
        if len(layers) <= ROWS or (exit_layer, draft_length) in (*numbered, best):
            strong = abs(float(norm(value)) - 0.5) > 0.33
            say(panel, x, y, f"{value:.2f}", "white" if strong else "black", family="sans-serif")
    panel.imshow(values, aspect="auto", origin="lower", cmap=colours, norm=norm, interpolation="nearest")
    corner = (lengths.index(best[1]) - 0.5, layers.index(best[0]) - 0.5)
    panel.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=2, clip_on=False))
    panel.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    shown = [y for y in range(len(layers)) if len(layers) <= ROWS or y % 2 == 0]
    panel.set_yticks(shown, [str(layers[y]) for y in shown])
    panel.tick_params(length=0)
