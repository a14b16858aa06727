"""Draw the figures of docs/figures from committed result files, the newest of each kind.

    python benchmarks/figures.py                                  # all that have their files
    python benchmarks/figures.py --inspect FILE --figures FOLDER  # that lens and timeline; somewhere else

Lens and timeline come from `layerskip inspect ... --generate N --save`, the exits from `layerskip eval ... --save`
of one or more models, the speed-ups from `tuning.py --save`, those by kind of text from
`sources.py --save`.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kinds import KINDS

from layerskip.errors import UserError
from layerskip.measure.exits import draw
from layerskip.measure.exits.lens import Lens
from layerskip.measure.exits.timeline import Timeline

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of result files")
    parser.add_argument("--inspect", type=Path, help="result of `layerskip inspect` to draw")
    parser.add_argument(
        "--figures", type=Path, default=HERE.parent / "docs" / "figures", help="folder to write"
    )
    arguments = parser.parse_args()
    arguments.figures.mkdir(parents=True, exist_ok=True)
    told = newest(arguments.results, "inspect")
    ours = newest(arguments.results, "sources")
    ours = [file for file in ours if file.name.startswith("sources_smollm2-135m_")]
    demo = [file for file in told if file.name.startswith("inspect_smollm2-135m_")]
    inspected = [arguments.inspect] if arguments.inspect else [file for file in told if file not in demo][-1:]
    tuned = newest(arguments.results, "tuning")
    sources: dict[str, tuple[list[Path], Callable[[list[Any], Path], Path]]] = {
        "exits.png": (newest(arguments.results, "eval"), exits),
        # The one with trained exits is worth a surface; the other's is below 1 everywhere.
        "speedup-surface.png": (tuned, lambda results, file: draw.speedup_surface(fastest(results), file)),
        "acceptance-by-position.png": (
            tuned or newest(arguments.results, "doctor") or newest(arguments.results, "bench"),
            acceptance,
        ),
        "exit-gate.png": (newest(arguments.results, "exit-gate")[-1:], gate),
        "adapter-gate.png": (newest(arguments.results, "adapter-gate")[-1:], adapter_gate),
        "builtin-speedup.png": (ours, builtin),
        "scratch.png": (newest(arguments.results, "scratch")[-1:], scratch),
        "continual.png": (newest(arguments.results, "continual")[-1:], continual),
        "lens.png": (inspected, lens),
        "timeline.png": (inspected, timeline),
        "demo-rounds.png": (demo, timeline),
    }
    for name, (files, make) in sources.items():
        if not files:
            print(f"{name}: no result file yet")
            continue
        try:
            make([json.loads(file.read_text(encoding="utf-8")) for file in files], arguments.figures / name)
        except UserError as error:
            raise SystemExit(f"{name}: {error.message}") from error
        except LookupError as error:
            print(f"{name}: skipped, {', '.join(file.name for file in files)} has no {error}")
            continue
        print(f"{name}: drawn from {', '.join(file.name for file in files)}")


def newest(folder: Path, kind: str) -> list[Path]:
    """The latest file of each model and setting, the latest of all at the end; names end in their date."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(f"{kind}_*.json"), key=lambda path: (path.name[-15:], path.name)):
        if "_sim" in path.name:
            continue  # its acceptance is made up
        found.pop(path.name[:-15], None)
        found[path.name[:-15]] = path
    return list(found.values())


def title(result: dict[str, Any]) -> str:
    trained = draw.trained_exits(result)
    told = result["configuration"]
    return f"{told['model']}, {'trained' if trained else 'untrained'} exits"


def by_title(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name results; of those with one name the latest stands. Untrained first, as before comes before after."""
    named = {title(result): result for result in results}
    return dict(sorted(named.items(), key=lambda item: bool(draw.trained_exits(item[1]))))


def exits(results: list[dict[str, Any]], file: Path) -> Path:
    return draw.exits(by_title(results), file)


def fastest(results: list[dict[str, Any]]) -> dict[str, Any]:
    return max(results, key=lambda result: max(cell["speedup"]["ratio"] for cell in result["grid"]))


def builtin(results: list[dict[str, Any]], file: Path) -> Path:
    """A group per kind of text and one of their mean; the two sources come before both of them together."""
    names = {"exit": "adapter alone", "lookup": "copies alone", "default": "both, the default"}
    result = results[-1]
    told = {
        textwrap.fill(KINDS[kind].title, 12): {
            words: by_name[name]["speedup"] for name, words in names.items() if name in by_name
        }
        for kind, by_name in result["kinds"].items()
    }
    told["mean"] = {words: result["mean"].get(name) for name, words in names.items()}
    title = "Self-speculation over plain decoding of the same model"
    return draw.bars(
        told, file, title, "speed-up, x", "black line: plain decoding; 95% intervals over prompts"
    )


def gate(results: list[dict[str, Any]], file: Path) -> Path:
    """A group per short run, named with what it did to the model; a bar per kind of prompt, at its best exit."""
    groups = {}
    for name, run in results[-1]["runs"].items():
        kinds = {kind: {"ratio": max(found["agreement"].values())} for kind, found in run["kinds"].items()}
        groups[f"{name.replace('_', ' ')}\nx {run['perplexity_ratio']:.2f}"] = kinds
    title = "What short runs teach the best exit, and what that costs the whole model"
    note = "x: perplexity of the whole model over the base's; black line: the exit always agrees"
    return draw.bars(groups, file, title, "agreement with the last layer", note)


def adapter_gate(results: list[dict[str, Any]], file: Path) -> Path:
    """What a cell's drafts cost against what they bring, numbered by the speed-up it is predicted to give."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cells = sorted(results[-1]["cells"].items(), key=lambda item: -item[1]["speedup"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.5), width_ratios=(3, 2), layout="constrained")
    speedups = [told["speedup"] for _, told in cells]
    place = {
        "x": [1000 * told["draft_s"] for _, told in cells],
        "y": [told["kinds"]["mean"]["tokens_per_round"][3] for _, told in cells],
    }
    left.scatter(**place, c=speedups, cmap="viridis", s=220)
    for number, (x, y) in enumerate(zip(place["x"], place["y"], strict=True), 1):
        left.annotate(str(number), (x, y), ha="center", va="center", color="white", fontsize=8)
    left.set_xlabel("ms a draft")
    left.set_ylabel("tokens per round, four drafts")
    left.set_title("What each setting learnt from the same tokens", fontsize=11)
    right.barh(range(len(cells)), speedups, color="0.7")
    right.set_yticks(range(len(cells)), [f"{i}  {name}" for i, (name, _) in enumerate(cells, 1)], fontsize=8)
    right.invert_yaxis()
    right.set_xlim(1.0)
    right.set_xlabel("predicted speed-up at its best K")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


def scratch(results: list[dict[str, Any]], file: Path) -> Path:
    """What dropout and exit loss each do to a model trained from scratch; intervals are over seeds."""
    cells = results[-1]["cells"]
    figure = draw.canvas(4.0)
    left, middle, right = figure.subplots(1, 3)
    colours = dict(zip(cells, (draw.GREY, *draw.SERIES), strict=False))
    for place, (name, told) in enumerate(cells.items()):
        exits = sorted(told["exits"], key=int)
        for panel, key, factor in ((left, "agreement", 100), (middle, "speedup", 1)):
            shown = [k for k in exits if key in told["exits"][k]]
            found = [told["exits"][k][key] for k in shown]
            panel.errorbar(
                [int(k) + 0.06 * (place - 2) for k in shown],
                [factor * one["ratio"] for one in found],
                yerr=[[factor * end for end in ends] for ends in zip(*map(away, found), strict=True)],
                fmt="o-", color=colours[name], markersize=4, linewidth=1.4, capsize=2,
            )  # fmt: skip
        rise = told["perplexity_change"]
        ends = [[100 * end] for end in away(rise)]
        right.bar(place, 100 * rise["ratio"], yerr=ends, color=colours[name], ecolor="black", capsize=3)
    middle.axhline(1.0, color="black", linewidth=1)
    right.axhline(0.0, color="black", linewidth=1)
    right.set_xticks([])
    draw.dress(left, "Agreement with the last layer", "exit layer E", "share of positions, %")
    draw.dress(middle, "Self-speculation over plain decoding", "exit layer E", "speed-up, x")
    draw.dress(right, "Perplexity of the last layer", "", "over the baseline's, %")
    seeds = len(next(iter(cells.values()))["by_seed"])
    note = f"95% intervals over {seeds} seeds, where a cell has several" if seeds > 1 else "one seed"
    draw.legend(figure, draw.signs({colour: name for name, colour in colours.items()}, note))
    return draw.written(figure, file)


def continual(results: list[dict[str, Any]], file: Path) -> Path:
    """What continual training gives every exit, and the loss of exits over the tokens seen."""
    told = results[-1]
    figure = draw.canvas(4.0)
    panels = figure.subplots(1, 1 + len(told["cells"]))
    for panel in panels[2:]:
        panel.sharey(panels[1])
    colours = dict(zip(("before", *told["cells"]), (draw.GREY, *draw.SERIES), strict=False))
    for name, own in (("before", told["before"]), *((k, c["exits"]) for k, c in told["cells"].items())):
        shown = sorted(own, key=int)[:-1]
        panels[0].plot(
            [int(k) for k in shown], [100 * own[k]["agreement"] for k in shown], "o-", color=colours[name],
            markersize=3, linewidth=1.4,
        )  # fmt: skip
    for panel, (name, own) in zip(panels[1:], told["cells"].items(), strict=True):
        points = own["curve"]
        for k in points[0]["loss"]:
            millions, nats = [p["tokens"] / 1e6 for p in points], [p["loss"][k] for p in points]
            panel.plot(millions, nats, "o-", color=colours[name], markersize=2, linewidth=1)
            panel.annotate(k, (millions[-1], nats[-1]), fontsize=7)
        panel.set_xscale("log")
        draw.dress(panel, f"Loss of each exit, {name}", "million tokens", "nats per token")
    draw.dress(panels[0], "Agreement with the last layer", "exit layer E", "share of positions, %")
    draw.legend(figure, draw.signs({colour: name for name, colour in colours.items()}, "held-out text"))
    return draw.written(figure, file)


def away(told: dict[str, Any]) -> tuple[float, float]:
    """How far an interval's ends are from its middle; 0 where there is none."""
    low, high = told.get("ci95", (told["ratio"], told["ratio"]))
    return max(0.0, told["ratio"] - low), max(0.0, high - told["ratio"])


def acceptance(results: list[dict[str, Any]], file: Path) -> Path:
    """A panel per model, from doctor's or the tuning's figures, else from what a benchmark saw at its E."""
    series: dict[str, dict[int, list[float | None]]] = {}
    for name, result in by_title(results).items():
        found = result.get("doctor", result).get("acceptance_by_position")
        if found is None:
            own = result["methods"]["self-speculative"]
            found = {own["exit_layer"]: own["acceptance_by_position"]}
        series[name] = {int(exit_layer): shares for exit_layer, shares in found.items()}
    return draw.acceptance(series, file)


def lens(results: list[dict[str, Any]], file: Path) -> Path:
    told = results[-1]["configuration"]
    return draw.lens(Lens(**results[-1]["lens"]), file, draw.headline(told["model"], told["text"]))


def timeline(results: list[dict[str, Any]], file: Path) -> Path:
    result, told = results[-1], results[-1]["configuration"]
    if result["timeline"] is None:
        raise LookupError("timeline: it was made without --generate")
    return draw.timeline(Timeline.read(result["timeline"]), file, draw.headline(told["model"], told["text"]))


if __name__ == "__main__":
    main()
