"""How the exits learn: loss and agreement with the last layer over the steps of a run, as figures and a picture.

    python benchmarks/curves.py --model MODEL --baseline BASELINE --save
    python benchmarks/curves.py --result benchmarks/results/curves_*.json          # draws from a saved file again

MODEL and BASELINE are output folders of `layerskip train` (their trainer_state.json, or that of their newest
checkpoint), or such a file. --save writes the numbers to benchmarks/results and then draws them; without it and
without --result the picture is drawn only. Agreement is the share of positions with a label at which the exit's
best token is the last layer's, so it is 100% for the last layer by definition and not drawn.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import record
import torch

from layerskip.measure.exits.canvas import name_lines
from layerskip.train import checkpoints

FIGURE = record.HERE.parent / "docs" / "figures" / "topv2-training.png"
EXIT = re.compile(r"(eval_)?exit_(\d+)_(loss|agreement)")
OTHERS = ("learning_rate", "dropped", "tokens", "tokens_per_s", "eval_predicted_speedup")
SMOOTH = 5  # logged points whose median a line shows
BASELINE, GREY = "#d55e00", "#666666"

Series = dict[str, list[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="run with LayerSkip")
    parser.add_argument("--baseline", type=Path, help="the same without")
    parser.add_argument("--result", type=Path, help="a saved curves_*.json, instead of runs")
    parser.add_argument("--limit", type=int, help="steps to show, for a rehearsal")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="PNG to write")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/curves_*.json")
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.result is None):
        parser.error("give --model, a run, or --result, a saved file")
    if arguments.result is not None:
        result = json.loads(arguments.result.read_text(encoding="utf-8"))
    else:
        runs = {"layerskip": arguments.model, "baseline": arguments.baseline}
        result = {
            "runs": {
                name: curves(history(path), arguments.limit)
                for name, path in runs.items()
                if path is not None
            },
            "configuration": record.configuration(arguments, torch.device("cpu")),
        }
        if arguments.save:
            record.save(result, "curves", arguments.model.resolve().stem)
    arguments.figure.parent.mkdir(parents=True, exist_ok=True)
    draw(result["runs"], arguments.figure)
    for name, run in result["runs"].items():
        print(f"{name}: " + ", ".join(last_values(run)))
    print(f"drawn: {arguments.figure.name}")


def history(path: Path) -> list[dict[str, Any]]:
    """Read the log of a run from its folder, its newest checkpoint or a trainer_state.json."""
    file = path
    if path.is_dir():
        file = path / "trainer_state.json"
        if not file.is_file() and (newest := checkpoints.latest(path)) is not None:
            file = newest / "trainer_state.json"
    if not file.is_file():
        raise SystemExit(f"{path.name} holds no trainer_state.json: no checkpoint was saved yet")
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["log_history"]
    return found


def curves(log: list[dict[str, Any]], limit: int | None = None) -> dict[str, Series]:
    """Gather {name: {"steps": [...], "values": [...]}}; exits rotate, so each has steps of its own."""
    found: dict[str, Series] = {}
    for line in log:
        if limit is not None and line["step"] > limit:
            continue
        for name, value in line.items():
            if EXIT.fullmatch(name) or name in OTHERS:
                series = found.setdefault(name, {"steps": [], "values": []})
                series["steps"].append(line["step"])
                series["values"].append(float(f"{value:.5g}"))
    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def order(name: str) -> tuple[Any, ...]:
    match = EXIT.fullmatch(name)
    return (1, name) if match is None else (0, match[1] or "", match[3], int(match[2]))


def exits_of(run: dict[str, Series], what: str, prefix: str = "") -> dict[int, Series]:
    """Series of one figure by exit, the last layer's at the end."""
    names = {name: EXIT.fullmatch(name) for name in run}
    return {
        int(match[2]): run[name]
        for name, match in names.items()
        if match is not None and match[3] == what and (match[1] or "") == prefix
    }


def last_values(run: dict[str, Series]) -> list[str]:
    """Word the last evaluation, or else the last points of training."""
    prefix = "eval_" if exits_of(run, "loss", "eval_") else ""
    agreement = exits_of(run, "agreement", prefix)
    told = []
    for k, series in exits_of(run, "loss", prefix).items():
        same = agreement[k]["values"][-1] if k in agreement else None
        told.append(
            f"{prefix}exit {k} loss {series['values'][-1]:.3f}" + (f", {100 * same:.0f}%" if same else "")
        )
    return told


# -- the picture ---------------------------------------------------------------------------------------------


def draw(runs: dict[str, dict[str, Series]], file: Path) -> None:
    """Draw losses and agreement side by side; lines carry their names at their ends."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    figure = Figure(figsize=(11, 4.8), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    run = runs["layerskip"]
    losses, agreements = exits_of(run, "loss"), exits_of(run, "agreement")
    last = max(losses)
    early = [k for k in losses if k < last]
    # Viridis keeps its order of lightness for every kind of colour vision; the ends of lines are named as well.
    shades = {k: colormaps["viridis"](0.78 - 0.66 * i / max(1, len(early) - 1)) for i, k in enumerate(early)}
    labels: dict[Any, list[tuple[float, str, Any]]] = {left: [], right: []}
    for k in early:
        for panel, series, percent in ((left, losses, 1), (right, agreements, 100)):
            end = line(panel, series[k], shades[k], percent, width=1.8)
            labels[panel].append((end, f"exit {k}", shades[k]))
        for panel, what, percent in ((left, "loss", 1), (right, "agreement", 100)):
            dots(panel, exits_of(run, what, "eval_").get(k), shades[k], percent)
    end = line(left, losses[last], "black", 1, width=2.2)
    dots(left, exits_of(run, "loss", "eval_").get(last), "black", 1)
    labels[left].append((end, f"all {last} layers", "black"))
    if "baseline" in runs:
        plain = exits_of(runs["baseline"], "loss")[last]
        end = line(left, plain, BASELINE, 1, width=1.6, style=(0, (4, 2)))
        dots(left, exits_of(runs["baseline"], "loss", "eval_").get(last), BASELINE, 1)
        labels[left].append((end, "baseline", BASELINE))
    left.set_yscale("log")
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    ticks = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20]
    low, high = left.get_ylim()
    left.set_yticks([tick for tick in ticks if low <= tick <= high])
    left.set_title("Cross entropy of responses", loc="left", fontsize=11)
    left.set_ylabel("nats per token")
    # Where exits agree early on, the steps before that would take up most of the picture.
    right.set_ylim(0 if min(end for end, _, _ in labels[right]) < 60 else 40, 100)
    right.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    right.set_title("Exit's best token is the last layer's", loc="left", fontsize=11)
    right.set_ylabel("share of positions")
    for panel in (left, right):
        panel.set_xlabel("optimiser step")
        panel.set_xlim(0, max(losses[last]["steps"]))
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        name_lines(panel, labels[panel])
    if any(name.startswith("eval_exit") for name in run):
        left.plot([], [], "o", color=GREY, markersize=5, markeredgecolor="white", label="held-out data")
        left.plot([], [], color=GREY, linewidth=1.8, label=f"training data, median of {SMOOTH} logs")
        left.legend(frameon=False, fontsize=9, loc="upper right")
    figure.savefig(file, metadata={"Software": None})


def line(panel: Any, series: Series, colour: Any, factor: float, width: float, style: Any = "-") -> float:
    """Draw the points faintly and their running median over them; return where the line ends."""
    steps, values = series["steps"], [factor * value for value in series["values"]]
    smooth = []
    for i in range(len(values)):
        half = min(SMOOTH // 2, i, len(values) - 1 - i)
        smooth.append(statistics.median(values[i - half : i + half + 1]))  # a mean would lag on a steep slope
    panel.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
    panel.plot(steps, smooth, color=colour, linewidth=width, linestyle=style)
    return smooth[-1]


def dots(panel: Any, series: Series | None, colour: Any, factor: float) -> None:
    if series is not None:
        values = [factor * value for value in series["values"]]
        panel.plot(
            series["steps"],
            values,
            "o",
            color=colour,
            markersize=6,
            markeredgecolor="white",
            zorder=5,
            clip_on=False,
        )


if __name__ == "__main__":
    main()
