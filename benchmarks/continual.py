"""What continual training gives a model's exits, what the last layer pays, and what more tokens would bring.

    python benchmarks/continual.py --data TRAIN.jsonl --held HELD.jsonl --text HELD.txt --work RUNS --save

A cell is the recipe `continual-small`: published (as it is), held (the last layer keeps its distribution;
embeddings and head stay). Cells are trained one after the other and go on after any stop, as in scratch.py;
--train-only leaves the judging to a later call. `layerskip eval` judges every exit before and after on windows of
--text; the last layer's perplexity is compared window by window. During the run the loss of every exit on
beginnings of --held is read at each evaluation. A line over the logarithm of the tokens, fitted behind the first
tenth, says what a doubling brings, and what 2, 4 and 16 times the tokens would, with 95% intervals: of one run,
and if the line goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import record
import torch
from scratch import change, followed, judged, locked, quoted

from layerskip.checkpoint.files import write_text
from layerskip.errors import UserError
from layerskip.measure.records import work_folder
from layerskip.model.threads import chosen_threads
from layerskip.search.runs import TrialRun, losses_of
from layerskip.train.data.sources import examples
from layerskip.train.job.curve import fitted
from layerskip.train.job.recipe import Recipe, as_yaml, read_recipe

RECIPE = "continual-small"
CELLS = {"published": (), "held": ("last_loss=kl", "freeze=embeddings")}
MORE = (2, 4, 16)
FIRST = 0.1  # share of a run whose losses fall for other reasons: warm-up, and the first exits' great errors
BEGINNING = 1600  # characters of a held-out document, some 400 tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="text to train on, as `layerskip train` reads it"
    )
    parser.add_argument("--held", type=Path, required=True, help="documents of the same kind, for the curve")
    parser.add_argument("--text", type=Path, required=True, help="text to judge exits on, before and after")
    parser.add_argument("--work", type=Path, required=True, help="folder of runs and finished measurements")
    parser.add_argument("--cells", default=",".join(CELLS), help="comma-separated")
    parser.add_argument("--set", action="append", default=[], help="key=value over the recipe, for all cells")
    parser.add_argument("--windows", type=int, default=100, help="of --text")
    parser.add_argument("--rows", type=int, default=48, help="documents of --held whose beginnings are read")
    parser.add_argument("--train-only", action="store_true", help="leave the judging to a later call")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/continual_*.json")
    given = parser.parse_args()
    recipe = checked(given)
    assert recipe.model is not None
    told = {name: str(getattr(given, name)) for name in ("data", "held", "rows", "set")}
    work_folder(
        given.work.absolute().parent, given.work.name, {**told, "recipe": as_yaml(recipe, explain=False)}
    )
    result: dict[str, Any] = {"before": {}, "cells": {}}
    with locked(given.work / "lock") as lock:
        held = given.work / "held.jsonl"
        write_beginnings(given.held, given.rows, held)
        runs = {cell: followed(run_of(given, cell, held, lock)) for cell in given.cells.split(",")}
        if given.train_only:
            return
        digest = hashlib.sha256(given.text.read_bytes()).hexdigest()[:12]
        place = given.work / f"judged-{digest}-{given.windows}"
        before = judged_in(place / "before", recipe.model, given)
        result["before"] = before["exits"]
        for cell, run in runs.items():
            after = judged_in(place / cell, run.output, given)
            curve = losses(run, recipe.batch_size * recipe.accumulation * recipe.length)
            result["cells"][cell] = {
                "exits": after["exits"],
                "perplexity_change": change(after, before),
                "curve": curve,
                "more": more_tokens(curve),
                "seconds": run.seconds,
            }
    name = Path(recipe.model).name
    result["recipe"] = as_yaml(recipe.model_copy(update={"model": name}), explain=False)
    result["configuration"] = record.configuration(given, torch.device("cpu")) | {"threads": chosen_threads()}
    del result["configuration"]["set"]  # the recipe says it
    for cell, found in result["cells"].items():
        print(line(cell, found, result["before"]))
    if given.save:
        record.save(result, "continual", name, "cpu")


def checked(given: argparse.Namespace) -> Recipe:
    """Read every cell's recipe before a night is spent on the first; returns what they share.

    Raises: UserError for what cannot be run.
    """
    cells = given.cells.split(",")
    if strange := {*cells} - {*CELLS}:
        raise UserError(f"--cells: {', '.join(sorted(strange))}", f"any of {', '.join(CELLS)}")
    for path in (given.held, given.text):
        if not path.is_file():
            raise UserError(f"no file {path}", "--held and --text name files")
    for cell in cells:
        read_recipe(RECIPE, [*given.set, *CELLS[cell]])
    recipe = read_recipe(RECIPE, given.set)
    if recipe.global_batch is not None:
        raise UserError("global_batch hides how many tokens a step has", "set batch_size and accumulation")
    return recipe


def write_beginnings(source: Path, count: int, file: Path) -> None:
    """Write the beginnings of the first documents, once. Raises: UserError where they are not plain text."""
    if file.is_file():
        return
    found = [*itertools.islice(examples(str(source)), count)]
    if not all("text" in example for example in found):
        raise UserError(f"{source} is not plain text", "give a .txt file, or .jsonl with `text`")
    write_text(file, "".join(json.dumps({"text": one["text"][:BEGINNING]}) + "\n" for one in found))


def run_of(given: argparse.Namespace, cell: str, held: Path, lock: int) -> TrialRun:
    sources = [f"data={quoted(given.data)}", f"eval_data={quoted(held)}", "eval_limit=null"]
    return TrialRun(given.work / cell, RECIPE, [*given.set, *CELLS[cell], *sources], lock)


def judged_in(folder: Path, model: Any, given: argparse.Namespace) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    return judged(folder, model, given.text, given.windows, "float32")


def losses(run: TrialRun, tokens_per_step: int) -> list[dict[str, Any]]:
    """Of every evaluation: places of tokens until then, and the loss of each exit in nats per token."""
    found = {step: losses_of(line) for step, line in run.evaluations().items()}
    done = run.result
    assert done is not None
    found.setdefault(done["steps"], {k: one["loss"] for k, one in done["exits"].items()})
    return [{"tokens": step * tokens_per_step, "loss": found[step]} for step in sorted(found)]


def more_tokens(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit each exit's loss over log2(tokens): what a doubling brings, and what more tokens would.

    Left out are the first tenth, and an end less than half an interval behind the evaluation before it. Nothing
    from fewer than three points.
    """
    end = curve[-1]["tokens"]
    points = [point for point in curve if point["tokens"] > FIRST * end]
    if len(points) > 2 and 2 * (end - points[-2]["tokens"]) < points[-2]["tokens"] - points[-3]["tokens"]:
        points.pop()
    if len(points) < 3:
        return {}
    told = {}
    for k in points[0]["loss"]:
        line = fitted([(math.log2(point["tokens"]), point["loss"][k]) for point in points])
        told[k] = {
            "doubling": line.rise().record(),
            "points": len(points),
            **{str(times): line.at(math.log2(times * end)).record() for times in MORE},
        }
    return told


def line(cell: str, found: dict[str, Any], before: dict[str, Any]) -> str:
    """Word a cell: what the last layer paid, then every exit's agreement before and after."""
    exits = ", ".join(
        f"E {e}: {100 * before[e]['agreement']:.0f} to {100 * one['agreement']:.0f}%"
        for e, one in found["exits"].items()
    )
    return f"{cell}: last layer {100 * found['perplexity_change']['ratio']:+.1f}% perplexity; {exits}"


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # the run in progress is stopped with its checkpoint
    record.run(main)
