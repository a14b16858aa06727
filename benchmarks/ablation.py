"""What each part of the exit adapter is worth, all trained for the same time and raced in the engine.

    python benchmarks/ablation.py --train OWN --held HELD --data DATA --work WORK --threads 2 --save

OWN and HELD are what `distill-data --states` wrote (a file or a folder), DATA what sources.py reads. The cells,
each the recipe `exit-adapter` with one part more than the one before: a square matrix behind exit 1 alone; the last
state of the position before beside it; a block; drafts that are trained on drafts; exit 0 in place of exit 1. Two
short runs of each tell the seconds of a step, and the cell then gets as many steps as fit into --seconds. Each
is raced alone and together with copies (the last part) on prompts of nine kinds, interleaved with plain decoding.

Runs and finished prompts are kept in the work folder: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import record
import torch
from builtin_tables import ablation_table
from kinds import KINDS, chosen
from sources import measured_kinds, report

import layerskip
from layerskip.decode.load import resolve_device
from layerskip.errors import UserError
from layerskip.measure.results import named
from layerskip.search.runs import StoppedError, TrialRun

RECIPE, MAP = "exit-adapter", "map"
MAPPED = ("exit_adapter=false", "exit_map=true", "exits=[1]")
CELLS = {
    MAP: MAPPED,
    "last state": ("exits=[1]", "adapter_blocks=0", "adapter_steps=1"),
    "block": ("exits=[1]", "adapter_steps=1"),
    "drafts on drafts": ("exits=[1]",),
    "exit 0": (),
}
REHEARSAL = (20, 60)  # steps of the two short runs whose difference is the time of a step
METHODS = ("ar", "exit", "default")
FIGURES = ("steps", "train_s", "step_s", "tokens", "drafts_right", "tokens_per_round")


def main() -> None:
    given = parsed()
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    kinds, cells = chosen(given.tasks), given.cells.split(",")
    if strange := {*cells} - {*CELLS}:
        raise UserError(f"--cells {given.cells}: {', '.join(sorted(strange))}", f"any of {', '.join(CELLS)}")
    result: dict[str, Any] = {"cells": {}}
    for cell in cells:
        trained = taught(given, cell)
        lm = layerskip.load(given.work / cell / "whole" / "run", dtype=given.dtype)
        own = argparse.Namespace(
            **{**vars(given), "work": given.work / cell, "peers": None, "temperature": 0.0}
        )
        by_kind = measured_kinds(own, lm, kinds, METHODS)
        raced = report(by_kind, METHODS, 0.0)
        equal = all(
            told[name]["equal"] == told[name]["prompts"]
            for told in raced["kinds"].values()
            for name in METHODS[1:]
        )
        result["cells"][cell] = {**trained, **raced, "equal": equal}
        print("\n".join(ablation_table(result)), flush=True)
    result["configuration"] = record.configuration(given, resolve_device("cpu"))
    if given.save:
        record.save(result, "ablation", given.name or named(given.model), given.dtype, "cpu")


def taught(given: argparse.Namespace, cell: str) -> dict[str, Any]:
    """Train a cell for the given seconds; what its run told."""
    base = [
        f"model={given.model}",
        f"data={path(given.train)}",
        f"eval_data={path(given.held)}",
        *CELLS[cell],
    ]
    base += [f"seed={given.seed}", f"states_gb={given.states_gb}"]
    short = [run(given.work / cell / f"short-{steps}", [*base, f"steps={steps}"]) for steps in REHEARSAL]
    step_s = (short[1]["train_s"] - short[0]["train_s"]) / (REHEARSAL[1] - REHEARSAL[0])
    steps = max(1, round(given.seconds / step_s))
    told = run(given.work / cell / "whole", [*base, f"steps={steps}"])
    return {"step_s": step_s, **{name: told[name] for name in FIGURES if name in told}}


def run(folder: Path, settings: list[str]) -> dict[str, Any]:
    """One run of the recipe, or what it told before."""
    print(f"{folder.parent.name}: {folder.name}", flush=True)
    trial = TrialRun(folder, RECIPE, settings)
    try:
        for _ in trial.follow():
            pass
    except StoppedError as error:
        raise UserError(str(error), "the same command goes on") from error
    assert trial.result is not None
    return trial.result


def path(given: Path) -> str:
    return json.dumps(str(given.absolute()))


def parsed() -> argparse.Namespace:
    parser = record.comparison(__doc__, ",".join(KINDS))
    parser.set_defaults(model="smollm2-135m-base")
    parser.add_argument("--train", type=Path, required=True, help="own answers to learn from")
    parser.add_argument("--held", type=Path, required=True, help="own answers that nobody learns from")
    parser.add_argument("--cells", default=",".join(CELLS), help="comma-separated")
    parser.add_argument("--seconds", type=float, default=180, help="of training, each cell")
    parser.add_argument("--states-gb", type=float, default=4.0, help="disk for states, see the recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=4, help="prompts of a kind")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--trials", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    record.run(main)
