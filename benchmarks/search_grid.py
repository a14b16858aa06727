"""Is the search as good as a grid? A grid of 24 runs, a search with the time of ten, judged on other text.

    python benchmarks/search_grid.py --model BASE --data scratch --other OTHER.txt --work W --steps 60 --save

BASE is a small model without exits that `layerskip train scratch-small p_max=0 e_scale=0` made of DATA (the
folder that scripts/make_scratch.py wrote). Every run gives it exits: the recipe `scratch-small` from BASE on,
with the settings of a cell. The grid is that of GRID; the search has the same keys as ranges and --trials, by
default as many as its time allows. Both choose by the search's own value: predicted speed-up on held-out rows,
less the penalty for what the whole model pays beyond 1% of the best whole model. The two runs chosen are judged on
OTHER, window by window: predicted speed-up by the cost model in layers, and perplexity. Runs are resumed after a
stop: the same command goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from scratch import kept, quoted
from transformers import AutoConfig

from layerskip.measure.intervals import resampled
from layerskip.measure.records import Records
from layerskip.model.cost import Cost, expected_tokens
from layerskip.search.runs import Figures, TrialRun
from layerskip.search.space import read_space
from layerskip.search.study import Search, speedup_of, worth
from layerskip.train.figures import DRAFT_LENGTHS

RECIPE, MAX_COST, RUNS = "scratch-small", 0.01, 10
GRID = {
    "e_scale": ("0.05", "0.2", "0.8"),
    "learning_rate": ("3e-4", "1e-3"),
    "p_max": ("0", "0.1"),
    "exits": ("[2]", "[2, 4, 6]"),
}
RANGES = ("e_scale=0.05..0.8", "learning_rate=2e-4..2e-3", "p_max=0|0.1", "exits=[2]|[2, 4, 6]")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--other", type=Path, required=True, help="text that neither chose by")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=96, help="held-out rows that runs are judged by")
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--trials", type=int, help="of the search")
    parser.add_argument("--save", action="store_true", help="write a file into benchmarks/results")
    given = parser.parse_args()
    fixed = [
        "from_config=null", f"model={quoted(given.model)}", f"data={quoted(given.data / 'train.jsonl')}",
        f"eval_data={quoted(given.data / 'held.jsonl')}", f"steps={given.steps}",
        f"eval_limit={given.rows}",
    ]  # fmt: skip
    given.work.mkdir(parents=True, exist_ok=True)
    search = Search(
        given.work / "search", RECIPE, read_space([*fixed, *RANGES], RECIPE), 1e9, MAX_COST, given.trials
    )
    reference = search.reference()
    cells = [grid_cell(given.work / "grid", fixed, cell) for cell in grid()]
    lowest = min(reference[given.steps], *(cell["loss"] for cell in cells))
    for cell in cells:
        cell["value"], cell["cost"] = worth(Figures(cell["speedup"], cell["loss"]), lowest, MAX_COST)
    search.budget_s = RUNS * statistics.fmean(cell["seconds"] for cell in cells)
    for trial in search.run():
        print(
            f"trial {trial.number}: {trial.params} {trial.state.name} {trial.value}",
            file=sys.stderr,
            flush=True,
        )
    best = search.finished()[0]
    winner = max(cells, key=lambda cell: cell["value"])
    found = {
        "grid": winner | {"runs": len(cells), "seconds": sum(cell["seconds"] for cell in cells)},
        "search": {
            "settings": best.params, "value": best.value, "speedup": speedup_of(best),
            "cost": search.cost_of(best), "seconds": search.spent_s,
            "trials": len(search.study.trials), "finished": len(search.finished()),
            "folder": str(given.work / "search" / f"trial-{best.number:03d}"),
        },
    }  # fmt: skip
    own = {name: judged(Path(told.pop("folder")), given) for name, told in found.items()}
    cells = [{key: value for key, value in cell.items() if key != "folder"} for cell in cells]
    result = found | {"other": compared(own["search"], own["grid"], given.model), "cells": cells}
    result["configuration"] = record.configuration(given, torch.device("cpu"))
    print(json.dumps({name: told for name, told in result.items() if name != "cells"}, indent=1))
    if given.save:
        record.save(result, "search", "scratch-small", "cpu")


def grid() -> list[list[str]]:
    return [
        [f"{key}={value}" for key, value in zip(GRID, values, strict=True)]
        for values in itertools.product(*GRID.values())
    ]


def grid_cell(place: Path, fixed: list[str], cell: list[str]) -> dict[str, Any]:
    """Train a cell to its end; its settings, figures and seconds."""
    name = "_".join(cell).translate(str.maketrans("", "", "[], "))
    run = TrialRun(place / name, RECIPE, [*fixed, *cell, "best_by=none"])
    [*_, (_, last)] = run.follow()
    assert run.result is not None
    print(
        f"{name}: {last.speedup:.3f} x, loss {last.loss:.3f}",
        file=sys.stderr,
        flush=True,
    )
    told = {"settings": cell, "speedup": last.speedup, "loss": last.loss}
    return told | {"seconds": run.seconds, "folder": str(run.folder)}


def judged(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Windows of the other text as a run sees them: tokens, and of each exit how many agreed and their NLL."""
    kept(folder / "other.json", "eval", folder / "run", "--text", given.other, "--limit", given.windows, "--work",
         folder / "judged", "--dtype", "float32")  # fmt: skip
    windows = Records(folder / "judged" / "text").found
    return [windows[i]["text"] for i in sorted(windows)]


def compared(one: list[dict[str, Any]], other: list[dict[str, Any]], model: Path) -> dict[str, Any]:
    """Predicted speed-up of both, its difference and the change of perplexity, with intervals over windows."""
    config = AutoConfig.from_pretrained(model)
    whole = price(config.num_hidden_layers, config)
    tokens = np.array([window["tokens"] for window in one], float)
    agreed = [
        {
            e: np.array([window["exits"][e]["agreed"] for window in windows], float)
            for e in windows[0]["exits"]
        }
        for windows in (one, other)
    ]

    def speedup(sums: dict[str, np.ndarray], n: np.ndarray) -> np.ndarray:
        return np.max(
            [whole(int(e), own / n) for e, own in sums.items() if int(e) < config.num_hidden_layers], axis=0
        )

    exits = list(agreed[0])
    both = [agreed[i][e] for i in (0, 1) for e in exits]

    def difference(n: np.ndarray, *columns: np.ndarray) -> np.ndarray:
        own, its = (
            dict(zip(exits, (column.sum(-1) for column in part), strict=True))
            for part in (columns[: len(exits)], columns[len(exits) :])
        )
        return speedup(own, n.sum(-1)) - speedup(its, n.sum(-1))

    totals = [{e: column.sum() for e, column in part.items()} for part in agreed]
    last = str(config.num_hidden_layers)
    nll = [np.array([window["exits"][last]["nll"] for window in windows]) for windows in (one, other)]
    return {
        "windows": len(one),
        "search": float(speedup(totals[0], tokens.sum())),
        "grid": float(speedup(totals[1], tokens.sum())),
        "difference": {
            "mean": float(difference(tokens, *both)), "ci95": list(resampled(difference, tokens, *both)),
        },
        "perplexity_change": float(np.expm1((nll[0] - nll[1]).sum() / tokens.sum())),
    }  # fmt: skip


def price(layers: int, config: Any) -> Callable[[int, Any], Any]:
    """The cost model in layers: speed-up of an exit at its best draft length, given agreement per token."""
    width, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    per_layer = width * (2 * width + 2 * kv + 3 * config.intermediate_size)
    head = config.vocab_size * width / per_layer

    def of(exit_layer: int, agreement: Any) -> Any:
        cost = Cost(layers, exit_layer, head, head)
        rates = np.atleast_1d(agreement)
        best = [max(cost.speedup(n, expected_tokens(n, a)) for n in DRAFT_LENGTHS) for a in rates]
        return np.array(best) if np.ndim(agreement) else best[0]

    return of


if __name__ == "__main__":
    record.run(main)
