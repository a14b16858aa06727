"""Pictures of a recipe's schedule: drop rate by layer and time, which exits are on when, their share of the loss.

`picture` draws a PNG with matplotlib, `text_picture` the same with characters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.errors import UserError, hint_of

if TYPE_CHECKING:
    from layerskip.train.objective.schedule import Schedule

COLUMNS = 200  # moments of the run that are looked at
FEW = 24  # steps that show how exits rotate


@dataclass(frozen=True)
class Picture:
    """What is drawn, sampled from a schedule; lists of layers begin with the first."""

    rates: list[list[float]]  # [moments][L]
    weights: list[dict[int, float]]  # [moments] of all the run, or the first steps where exits rotate
    first_steps: bool
    mean_weights: dict[int, float]
    mean_dropped: float  # share of the layers' work


def sampled(schedule: Schedule, total: int) -> Picture:
    """Look at a schedule at evenly spread moments, and at its exits step by step where they rotate."""
    last = max(0, total - 1)
    moments = sorted({round(last * column / (COLUMNS - 1)) for column in range(COLUMNS)})
    rates = [schedule.drop_rates(step, total) for step in moments]
    rotates = schedule.curriculum == "rotational"
    period = schedule.rotation or max(1, len(schedule.candidates))
    steps = range(min(total, max(FEW, 2 * period))) if rotates else moments
    weights = [schedule.weights(step, total) for step in steps]
    # Whole rotations only, or the exits that come first would seem to count more.
    counted = weights[: max(1, len(weights) // period) * period] if rotates else weights
    mean = {k: sum(w.get(k, 0.0) for w in counted) / len(counted) for k in range(1, schedule.num_layers + 1)}
    dropped = sum(sum(line) for line in rates) / (len(rates) * schedule.num_layers)
    return Picture(rates, weights, rotates and len(weights) < total, mean, dropped)


def picture(schedule: Schedule, total: int, title: str, file: Path) -> Path:
    """Draw a PNG. Raises: ImportError without matplotlib, UserError when the file cannot be written."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    seen, layers = sampled(schedule, total), schedule.num_layers
    figure = Figure(figsize=(12, 5.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(4, 4, 2))
    moments, count = len(seen.rates), len(seen.weights)
    span = (0, total, 0.5, layers + 0.5)
    heat: list[list[float]] = [
        [100 * seen.rates[m][layer] for m in range(moments)] for layer in range(layers)
    ]
    image = left.imshow(
        heat, aspect="auto", origin="lower", extent=span, cmap="Blues", vmin=0, interpolation="nearest"
    )
    below: Any = {
        "location": "bottom",
        "pad": 0.03,
        "aspect": 40,
    }  # at the side it reads as the next panel's label
    figure.colorbar(image, ax=left, label="rows that skip it, %", **below)
    left.set_title(f"Layer dropout: {100 * seen.mean_dropped:.1f}% of the layers' work", fontsize=10)
    left.set_xlabel("optimiser step")
    left.set_ylabel("layer, or exit after it")
    on: list[list[float]] = [
        [seen.weights[m].get(k, 0.0) for m in range(count)] for k in range(1, layers + 1)
    ]
    shown: Any = 100 * _masked(on)
    smallest = min(2.0, max(float(shown.min()), 0.01))
    end = count if seen.first_steps else total
    image = middle.imshow(
        shown,
        aspect="auto",
        origin="lower",
        extent=(0, end, 0.5, layers + 0.5),
        cmap=ListedColormap(
            colormaps["YlOrRd"](np.linspace(0.3, 1, 256))
        ),  # its pale end is no colour on grey
        norm=LogNorm(smallest / 2, 100, clip=True),
        interpolation="nearest",
    )
    scale = figure.colorbar(image, ax=middle, label="share of the loss, %", format="{x:g}", **below)
    scale.ax.xaxis.set_minor_formatter(NullFormatter())
    what = "first steps" if seen.first_steps else "all of the run"
    middle.set_title(f"Exits that are on ({schedule.curriculum}, {what})", fontsize=10)
    middle.set_xlabel("optimiser step")
    middle.set_facecolor("#f4f4f4")
    trained = [k for k, weight in seen.mean_weights.items() if weight > 0]
    right.barh(trained, [100 * seen.mean_weights[k] for k in trained], height=0.8, color="#d95f0e")
    means = [seen.mean_weights[k] for k in trained]
    if max(means) > 20 * min(means):
        right.set_xscale("log")
        right.set_xlim(left=max(0.01, 50 * min(means)), right=100)
        right.xaxis.set_major_formatter("{x:g}")
    right.set_title("Mean share of the loss", fontsize=10)
    right.set_xlabel("%")
    right.grid(axis="x", color="#dddddd", linewidth=0.6)
    right.set_axisbelow(True)
    ticks = sorted({1, layers, *range(max(1, layers // 8), layers, max(1, layers // 8))})
    ticks = [k for k in ticks if k == layers or k + layers // 16 < layers]
    left.set_yticks(ticks)
    left.set_ylim(0.5, layers + 0.5)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        hint = hint_of(error, "--output names another .png, .svg or .pdf file")
        raise UserError(f"cannot write {file}: {error}", hint) from error
    return file


def text_picture(schedule: Schedule, total: int, width: int = 100) -> str:
    """Draw the same with characters, the last layer on top."""
    seen = sampled(schedule, total)
    begin, end = seen.rates[0], seen.rates[-1]
    peak = max(max(line) for line in seen.rates) or 1.0
    room = max(12, min(48, width - 52))
    step = max(1, -(-len(seen.weights) // room))
    columns = seen.weights[::step]
    heaviest = max(seen.mean_weights.values())
    fades = begin != end
    what = f"{'first ' + str(len(seen.weights)) if seen.first_steps else 'all'} steps"
    lines = [
        f"{'layer':>5}  {'drop rate':<20}  {'exits on, ' + what:<{len(columns)}}  mean share of the loss"
    ]
    for layer in range(schedule.num_layers, 0, -1):
        first, final = begin[layer - 1], end[layer - 1]
        rate = f"{100 * first:4.1f} > {100 * final:4.1f}%" if fades else f"{100 * final:4.1f}%"
        bar = "▇" * round(7 * max(first, final) / peak)
        cells = "".join("█" if layer in w else "·" for w in columns)
        share = seen.mean_weights[layer]
        told = f"{100 * share:5.1f}% {'▇' * max(1, round(12 * share / heaviest))}" if share else ""
        lines.append(
            f"{layer:>5}  {bar:<7} {rate:<12}  {cells:<{max(len(columns), 10 + len(what))}}  {told}".rstrip()
        )
    lines.append(f"layer dropout saves {100 * seen.mean_dropped:.1f}% of the layers' work over the run")
    return "\n".join(lines)


def _masked(values: list[list[float]]) -> Any:
    """Leave out zeros, which are exits that are off."""
    import numpy as np

    return np.ma.masked_equal(np.array(values), 0.0)
