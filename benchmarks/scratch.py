"""What dropout and exit loss each do to a small model trained from scratch: cells x seeds, resumed after any stop.

    python scripts/make_scratch.py TEXTS --output scratch --tokens 20000000
    python benchmarks/scratch.py --data scratch --work RUNS --seeds 0,1,2 --once dropout,gradual --save

A cell is the recipe `scratch-small` with some keys changed: baseline (neither), dropout, rotational and gradual
(exit loss alone), both (the recipe as it is). Cells are trained one after the other by `layerskip train`, a seed at
a time; those of --once have the first seed alone. One that is done is passed over, one that was interrupted goes on
from its checkpoint: the command may be killed at any moment and given again. Then `layerskip eval` judges every
exit on held-out text (agreement, perplexity), and `layerskip bench` measures acceptance and the speed-up of
self-speculation at --exits, equality first; with --train-only that waits for a call without it, on a machine that
does nothing else. The last layer's perplexity is compared with the baseline's of the same seed, window by window.
Intervals are 95% by Student's t over seeds; of a single seed there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import record
import torch

from layerskip.checkpoint.files import write_json
from layerskip.errors import UserError
from layerskip.measure.intervals import resampled
from layerskip.measure.records import Records, work_folder
from layerskip.model.threads import chosen_threads
from layerskip.reading import read_json
from layerskip.search.runs import StoppedError, TrialRun
from layerskip.train.job.curve import t95
from layerskip.train.job.recipe import as_yaml, read_recipe

RECIPE, BASELINE = "scratch-small", "baseline"
CELLS = {
    BASELINE: ("p_max=0", "e_scale=0"),
    "dropout": ("e_scale=0",),
    "rotational": ("p_max=0",),
    "gradual": ("p_max=0", "curriculum=gradual", "rotation=null"),
    "both": (),
}
FIGURES = ("agreement", "perplexity", "acceptance", "tokens_per_round", "speedup")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="what scripts/make_scratch.py wrote")
    parser.add_argument("--work", type=Path, required=True, help="folder of runs and finished measurements")
    parser.add_argument("--cells", default=",".join(CELLS), help="comma-separated, the baseline among them")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--once", default="", help="cells of the first seed alone, comma-separated")
    parser.add_argument("--set", action="append", default=[], help="key=value over the recipe, for all cells")
    parser.add_argument("--exits", default="2,4,6", help="exits to measure speed at")
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--windows", type=int, default=200, help="windows of the held-out text")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", help="of eval and bench")
    parser.add_argument("--train-only", action="store_true", help="leave the measuring to a later call")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/scratch_*.json")
    given = parser.parse_args()
    cells, seeds = given.cells.split(","), [int(seed) for seed in given.seeds.split(",")]
    once = {cell for cell in given.once.split(",") if cell}
    for option, named in (("--cells", {*cells}), ("--once", once)):
        if strange := named - {*CELLS}:
            raise UserError(f"{option}: {', '.join(sorted(strange))}", f"any of {', '.join(CELLS)}")
    if BASELINE in once:
        raise UserError(f"--once {given.once}", f"{BASELINE} has every seed: the others are compared with it")
    if BASELINE not in cells:
        raise UserError(f"--cells {given.cells} lacks {BASELINE}", "the others are compared with it: add it")
    made = read_json(given.data / "made.json", dict, "scripts/make_scratch.py writes it")
    recipe = as_yaml(read_recipe(RECIPE, given.set), explain=False)
    told = {
        name: value
        for name, value in vars(given).items()
        if name not in ("data", "work", "cells", "seeds", "once", "train_only", "save")
    }
    work_folder(given.work.absolute().parent, given.work.name, {**told, "made": made, "recipe": recipe})
    found: dict[str, dict[int, dict[str, Any]]] = {cell: {} for cell in cells}
    with locked(given.work / "lock") as lock:
        for seed in seeds:
            for cell in cells if seed == seeds[0] else [one for one in cells if one not in once]:
                run = trained(given, cell, seed, lock)
                if not given.train_only:
                    found[cell][seed] = measured(given, run)
    if given.train_only:
        return
    result: dict[str, Any] = {
        "cells": {cell: summed(by_seed, found[BASELINE]) for cell, by_seed in found.items()},
        "recipe": recipe,
        "made": made,
        "configuration": record.configuration(given, torch.device("cpu")) | {"threads": chosen_threads()},
    }
    for cell, told in result["cells"].items():
        print(line(cell, told))
    if given.save:
        record.save(result, "scratch", "small", given.dtype, "cpu")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold a lock that the training processes inherit: should this one be killed, its run ends before another."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for the run that an earlier call began", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


# -- one cell of one seed --------------------------------------------------------------------------------------


def trained(given: argparse.Namespace, cell: str, seed: int, lock: int) -> TrialRun:
    """Train what is left of it. Raises: UserError where it was stopped or failed."""
    run = TrialRun(
        given.work / f"{cell}-{seed}",
        RECIPE,
        [
            *given.set, *CELLS[cell], f"seed={seed}", f"from_config={quoted(given.data / 'model')}",
            f"data={quoted(given.data / 'train.jsonl')}",
        ],
        lock,
    )  # fmt: skip
    if run.result is None:
        print(f"{cell}, seed {seed}: training", flush=True)
    return followed(run)


def followed(run: TrialRun) -> TrialRun:
    """Train what is left of a run. Raises: UserError where it was stopped or failed."""
    try:
        for _ in run.follow():
            pass
    except StoppedError as error:
        raise UserError(str(error), "the same command goes on") from error
    return run


def judged(folder: Path, model: Any, text: Path, windows: int, dtype: str) -> dict[str, Any]:
    """Judge every exit of a model on windows of a text; the last layer's NLL and the tokens by window."""
    told = kept(
        folder / "eval.json", "eval", model, "--text", text, "--limit", windows, "--work", folder / "judged",
        "--dtype", dtype,
    )  # fmt: skip
    found, last = Records(folder / "judged" / "text").found, str(told["configuration"]["layers"])
    return {
        "exits": {str(row["exit_layer"]): {name: row[name] for name in FIGURES[:2]} for row in told["exits"]},
        "nll": [found[i]["text"]["exits"][last]["nll"] for i in sorted(found)],
        "tokens": [found[i]["text"]["tokens"] for i in sorted(found)],
    }


def measured(given: argparse.Namespace, run: TrialRun) -> dict[str, Any]:
    """Measure what is left of it; returns its figures by exit, and the last layer's by window."""
    folder = run.output.parent
    told = judged(folder, run.output, given.data / "held.txt", given.windows, given.dtype)
    exits = told["exits"]
    for exit_layer in map(str.strip, given.exits.split(",")):
        raced = kept(
            folder / f"bench-{exit_layer}.json", "bench", run.output, "--exit-layer", exit_layer,
            "--draft-length", given.draft_length, "--draft-vocab", "off", "--drafter", "exit",
            "--methods", "self-speculative", "--prompts", given.data / "prompts.jsonl", "--limit", given.prompts,
            "--max-new-tokens", given.max_new_tokens, "--trials", given.trials, "--dtype", given.dtype,
        )  # fmt: skip
        own, speedup = raced["methods"]["self-speculative"], raced["speedup"]
        exits[exit_layer] |= {name: own[name] or 0.0 for name in FIGURES[2:4]}
        exits[exit_layer]["equal"] = own["equal_outputs"] / own["of"]
        exits[exit_layer]["speedup"] = speedup["self-speculative/ar"]["median"]
    return told | {"seconds": run.seconds}


def quoted(path: Path) -> str:
    return json.dumps(str(path.absolute()))


def kept(file: Path, *command: Any) -> dict[str, Any]:
    """Read what a verb printed, from its file or by running it. Raises: UserError where it fails."""
    if not file.is_file():
        print(f"{file.parent.name}: {command[0]} {file.stem.partition('-')[2]}", flush=True)
        words = [sys.executable, "-m", "layerskip", "--quiet", *map(str, command), "--json"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"layerskip {command[0]} failed: {done.stderr.strip()[-500:]}", " ".join(words))
        write_json(file, json.loads(done.stdout.strip().split("\n")[-1]))
    told: dict[str, Any] = read_json(file, dict)
    return told


# -- over seeds ------------------------------------------------------------------------------------------------


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Average over seeds, with an interval where there are two."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"ratio": mean}
    away = t95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"ratio": mean, "ci95": [mean - away, mean + away]}


def change(own: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Compare the last layer's perplexity with another model's on the same windows; intervals are over windows."""
    import numpy as np

    if own["tokens"] != other["tokens"]:
        raise UserError("the two were judged on other windows", "remove what was judged, and begin anew")
    less, tokens = np.subtract(own["nll"], other["nll"]), np.asarray(own["tokens"], float)
    low, high = resampled(lambda a, b: np.expm1(a.sum(-1) / b.sum(-1)), less, tokens)
    return {"ratio": float(np.expm1(less.sum() / tokens.sum())), "ci95": [low, high]}


def summed(by_seed: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Put the figures of all seeds together: by exit, and the last layer against the baseline's of its seed."""
    first = next(iter(by_seed.values()))["exits"]
    exits = {
        k: {name: over_seeds([told["exits"][k][name] for told in by_seed.values()]) for name in names}
        for k, names in first.items()
    }
    changes = {str(seed): change(told, baseline[seed]) for seed, told in by_seed.items()}
    return {
        "exits": exits,
        "perplexity_change": over_seeds([told["ratio"] for told in changes.values()]),
        "perplexity_change_by_seed": changes,
        "by_seed": {str(seed): told["exits"] for seed, told in by_seed.items()},
        "seconds": [told["seconds"] for told in by_seed.values()],
    }


def line(cell: str, told: dict[str, Any]) -> str:
    """Word a cell: the last layer's perplexity and its change, then the exits that were raced."""
    last = max(told["exits"], key=int)
    raced = "; ".join(
        f"E {k}: agreement {100 * found['agreement']['ratio']:.0f}%, "
        f"acceptance {100 * found['acceptance']['ratio']:.0f}%, "
        f"{found['speedup']['ratio']:.2f} x, {100 * found['equal']['ratio']:.0f}% of outputs equal"
        for k, found in told["exits"].items()
        if "speedup" in found
    )
    perplexity = told["exits"][last]["perplexity"]["ratio"]
    return (
        f"{cell:10} perplexity {perplexity:.2f} ({100 * told['perplexity_change']['ratio']:+.1f}%); {raced}"
    )


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # the run in progress is stopped with its checkpoint
    record.run(main)
