"""What continual training gives a model's exits, what the last layer pays, and what more tokens would bring.

    python benchmarks/continual.py --data TRAIN.jsonl --held HELD.jsonl --text HELD.txt --work RUNS --save

A cell is the recipe `continual-small`: published (as it is), held (the last layer keeps its distribution). Cells
are trained one after the other and go on after any stop, as in scratch.py; --train-only leaves the judging to a
later call. `layerskip eval` judges every exit before and after on windows of --text; the last layer's perplexity is
compared window by window. During the run the loss of every exit on rows of --held is read at each evaluation: a
line over the logarithm of the tokens, fitted behind the warm-up, says what a doubling brings, and what 2, 4 and 16
times the tokens would, with the 95% interval of a new point. Nobody knows whether a line goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import record
import torch
from scratch import change, kept, locked, quoted

from layerskip.errors import UserError
from layerskip.measure.records import Records, work_folder
from layerskip.model.threads import chosen_threads
from layerskip.search.runs import StoppedError, TrialRun
from layerskip.train.job.curve import fitted
from layerskip.train.job.recipe import as_yaml, read_recipe

RECIPE = "continual-small"
CELLS = {"published": (), "held": ("last_loss=kl", "freeze=embeddings")}
MORE = (2, 4, 16)
BEHIND = 0.1  # points of the first tenth of a run are its warm-up's


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="text to train on, as `layerskip train` reads it"
    )
    parser.add_argument("--held", type=Path, required=True, help="text of the same kind, for the curve")
    parser.add_argument("--text", type=Path, required=True, help="text to judge exits on, before and after")
    parser.add_argument("--work", type=Path, required=True, help="folder of runs and finished measurements")
    parser.add_argument("--cells", default=",".join(CELLS), help="comma-separated")
    parser.add_argument("--set", action="append", default=[], help="key=value over the recipe, for all cells")
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--rows", type=int, default=48, help="rows of --held that an evaluation reads")
    parser.add_argument("--train-only", action="store_true", help="leave the judging to a later call")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/continual_*.json")
    given = parser.parse_args()
    cells = given.cells.split(",")
    if strange := {*cells} - {*CELLS}:
        raise UserError(f"--cells: {', '.join(sorted(strange))}", f"any of {', '.join(CELLS)}")
    recipe = read_recipe(RECIPE, given.set)
    told = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(given).items()
        if name not in ("work", "cells", "train_only", "save")
    }
    text = as_yaml(recipe, explain=False)
    work_folder(given.work.absolute().parent, given.work.name, {**told, "recipe": text})
    with locked(given.work / "lock") as lock:
        runs = {cell: trained(given, cell, lock) for cell in cells}
    if given.train_only:
        return
    assert recipe.model is not None
    assert recipe.steps is not None
    before = judged(given, given.work / "before", recipe.model)
    found = {}
    for cell, run in runs.items():
        after = judged(given, run.folder, run.output)
        curve = losses(run, recipe.batch_size * recipe.accumulation * recipe.length)
        found[cell] = {
            "exits": after["exits"],
            "perplexity_change": change(after, before),
            "curve": curve,
            "more": more_tokens(curve, BEHIND),
            "seconds": run.seconds,
        }
    result: dict[str, Any] = {
        "before": before["exits"],
        "cells": found,
        "recipe": text,
        "configuration": record.configuration(given, torch.device("cpu")) | {"threads": chosen_threads()},
    }
    for cell, told in found.items():
        own = told["perplexity_change"]
        print(f"{cell}: last layer {100 * own['ratio']:+.1f}% perplexity; " + ", ".join(
            f"E {e}: {100 * before['exits'][e]['agreement']:.0f} to {100 * one['agreement']:.0f}%"
            for e, one in told["exits"].items()
        ))  # fmt: skip
    if given.save:
        record.save(result, "continual", "smollm2-135m-base", "cpu")


def trained(given: argparse.Namespace, cell: str, lock: int) -> TrialRun:
    """Train what is left of it. Raises: UserError where it was stopped or failed."""
    sources = [f"data={quoted(given.data)}", f"eval_data={quoted(given.held)}", f"eval_limit={given.rows}"]
    run = TrialRun(given.work / cell, RECIPE, [*given.set, *CELLS[cell], *sources], lock)
    try:
        for _ in run.follow():
            pass
    except StoppedError as error:
        raise UserError(str(error), "the same command goes on") from error
    return run


def judged(given: argparse.Namespace, folder: Path, model: Any) -> dict[str, Any]:
    """Agreement and perplexity of every exit, and the last layer's windows."""
    folder.mkdir(parents=True, exist_ok=True)
    told = kept(
        folder / "eval.json", "eval", model, "--text", given.text, "--limit", given.windows,
        "--work", folder / "judged", "--dtype", "float32",
    )  # fmt: skip
    windows, last = Records(folder / "judged" / "text").found, str(told["configuration"]["layers"])
    return {
        "exits": {str(row["exit_layer"]): {name: row[name] for name in ("agreement", "perplexity")}
                  for row in told["exits"]},
        "nll": [windows[i]["text"]["exits"][last]["nll"] for i in sorted(windows)],
        "tokens": [windows[i]["text"]["tokens"] for i in sorted(windows)],
    }  # fmt: skip


def losses(run: TrialRun, tokens_per_step: int) -> list[dict[str, Any]]:
    """Of every evaluation: tokens until then, and the loss of each exit in nats per token."""
    found: dict[int, dict[str, float]] = {}
    for state in run.output.glob("checkpoint-*/trainer_state.json"):
        for line in json.loads(state.read_text(encoding="utf-8"))["log_history"]:
            own = {
                key.split("_")[2]: value
                for key, value in line.items()
                if key.startswith("eval_exit_") and key.endswith("_loss")
            }
            if own:
                found[line["step"]] = own
    done = run.result
    assert done is not None
    found.setdefault(done["steps"], {k: one["loss"] for k, one in done["exits"].items()})
    return [{"tokens": step * tokens_per_step, "loss": found[step]} for step in sorted(found)]


def more_tokens(curve: list[dict[str, Any]], behind: float) -> dict[str, Any]:
    """Fit each exit's loss over log2(tokens) behind the warm-up: what a doubling brings, and more tokens would."""
    end = curve[-1]["tokens"]
    points = [point for point in curve if point["tokens"] > behind * end]
    if len(points) < 3:
        return {}
    told = {}
    for k in points[0]["loss"]:
        line = fitted([(math.log2(point["tokens"]), point["loss"][k]) for point in points])
        told[k] = {
            "doubling": line.slope,
            "points": len(points),
            **{str(times): line.at(math.log2(times * end)).record() for times in MORE},
        }
    return told


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # the run in progress is stopped with its checkpoint
    record.run(main)
