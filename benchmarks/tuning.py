"""How right the doctor and the tuner are: both look at some prompts, then a grid is measured on others.

    python benchmarks/tuning.py --model smollm2-135m --prompts benchmarks/prompts.jsonl --threads 2 --save
    python benchmarks/tuning.py --model MODEL --prompts test.jsonl.gz --no-chat --separator "\\n" --choose 30 \\
        --measure 40 --max-new-tokens 160 --threads 2 --save

Of every prompts file the first --choose lines go to the doctor and the tuner, the next --measure lines to the grid:
every (E, K) of --exits x --draft-length with the draft vocabulary predicted best for it, and the two choices, in
turn with plain decoding on every prompt, ends of sequence respected. Both may choose copies, alone or beside an
exit; the grid is of exits alone. Reported: the doctor's predicted against the measured speed-up of its choice; the
tuner's choice against the best cell of the grid, by paired bootstrap over prompts (the best cell is picked by the
very numbers it is compared with, which favours it).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import record
import torch

import layerskip
from layerskip.cli.prompts import encoded, unescaped
from layerskip.cli.results import progress
from layerskip.decode.load import resolve_device
from layerskip.measure.advice.cells import Analysis, Cell, worded
from layerskip.measure.advice.doctor import examine
from layerskip.measure.advice.prediction import (
    LENGTHS,
    analyse,
    candidate_exits,
    default_cell,
    predict_copies,
    spread,
)
from layerskip.measure.advice.tune import Race, Trial, finalists, halving, tuned
from layerskip.measure.exits.draw import BAND
from layerskip.measure.intervals import ratio_of_sums
from layerskip.measure.lines import read_prompts
from layerskip.measure.proof.equality import equality_promised

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel
    from layerskip.watch import Watch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, nargs="+", type=Path, help="JSON lines, also .gz")
    parser.add_argument("--choose", type=int, default=5, help="prompts of each file for doctor and tuner")
    parser.add_argument("--measure", type=int, default=5, help="the next ones of each file, for the grid")
    parser.add_argument(
        "--exits", default="", help="E of the grid; default: four of the trained ones, or spread"
    )
    parser.add_argument("--draft-length", default="1,2,4,8", help="K of the grid, comma-separated")
    parser.add_argument("--draft-vocab", default="auto", help="a number, auto (by prediction) or off")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180.0, help="time of the tuner's race")
    parser.add_argument("--trials", type=int, default=2, help="turns of the grid on every prompt")
    parser.add_argument("--separator", default="", help="put behind prompts that are text, as in training")
    parser.add_argument("--no-chat", action="store_true", help="prompts as plain text, template or not")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stack", default="auto", help="native, hf or auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/tuning_*.json")
    arguments = parser.parse_args()
    lengths = [int(k) for k in arguments.draft_length.split(",")]
    if not set(lengths) <= set(LENGTHS):
        raise SystemExit(f"predicted are draft lengths {', '.join(map(str, LENGTHS))}")
    torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    lm = layerskip.load(arguments.model, dtype=arguments.dtype, device=device, stack=arguments.stack)
    chosen, others = prompts_of(arguments, lm)
    grid_exits = [int(e) for e in arguments.exits.split(",") if e] or spread(candidate_exits(lm), 4)
    with progress() as watch:
        result = measured(arguments, lm, chosen, others, grid_exits, lengths, watch)
    result["configuration"] = {
        **record.configuration(arguments, device),
        "dtype": str(lm.stack.dtype).removeprefix("torch."),
        "stack": lm.stack.name,
        "num_prompts": {"choose": len(chosen), "measure": len(others)},
        "trained_exits": list(lm.facts.exits),
    }
    show(result)
    if arguments.save:
        dtype = result["configuration"]["dtype"]
        record.save(result, "tuning", Path(arguments.model).resolve().name, dtype, device.type)


def prompts_of(arguments: argparse.Namespace, lm: LanguageModel) -> tuple[list[list[int]], list[list[int]]]:
    """Encode the prompts to choose with, and those to measure on."""
    chat = lm.has_template and not arguments.no_chat
    separator = unescaped(arguments.separator)
    chosen, others = [], []
    for path in arguments.prompts:
        lines = read_prompts(path)[: arguments.choose + arguments.measure]
        if len(lines) <= arguments.choose:
            raise SystemExit(f"{path.name} has no prompts behind the first {arguments.choose}")
        items = [encoded(lm, line.content, chat, separator) for line in lines]
        chosen += items[: arguments.choose]
        others += items[arguments.choose :]
    return chosen, others


def measured(
    arguments: argparse.Namespace,
    lm: LanguageModel,
    chosen: list[list[int]],
    others: list[list[int]],
    grid_exits: list[int],
    lengths: list[int],
    watch: Watch,
) -> dict[str, Any]:
    """Ask doctor and tuner, then measure the grid and their choices on other prompts."""
    budget = arguments.max_new_tokens
    size = int(arguments.draft_vocab) if arguments.draft_vocab.isdecimal() else arguments.draft_vocab
    exits = sorted({*candidate_exits(lm), *grid_exits})
    analysis = analyse(lm, chosen, budget, exits, size, watch=watch)
    doctor = examine(lm, analysis, lm.has_template and not arguments.no_chat, lm.path.name if lm.path else "")
    by_doctor = Trial.predicted_by(analysis.recommended or analysis.best)
    predict_copies(lm, analysis, watch)
    racing = finalists(analysis, default_cell(lm))
    race = halving(lm, racing, chosen, budget, arguments.seconds, watch=watch)
    grid = grid_of(analysis, grid_exits, lengths)
    by_tuner = Trial(race[0].cell, race[0].predicted, race[0].confidence, race[0].policy)
    trials = {(trial.cell, trial.policy): trial for trial in (by_tuner, by_doctor, *grid)}
    again = Race(lm, [[prompt] for prompt in others], budget)
    again.warm_up(list(trials.values()))
    turns = arguments.trials * len(others)
    for turn in range(turns):
        watch("measuring the grid", turn, turns)
        again.turn(list(trials.values()))
    if equality_promised(lm) and (lost := sum(len(t.differing) for t in [*race, *trials.values()])):
        raise SystemExit(f"not lossless: {lost} outputs differ from plain decoding")
    # A setting that was chosen twice raced once.
    grid = [trials[trial.cell, "fixed"] for trial in grid]
    by_doctor, by_tuner = (trials[one.cell, one.policy] for one in (by_doctor, by_tuner))
    return {
        "doctor": doctor,
        "tune": tuned(analysis, race),
        "grid": [trial.record() for trial in grid],
        "doctor_choice": prediction_of(by_doctor),
        "tuner_choice": by_tuner.record(),
        "tuned_against_best": against_best(by_tuner, grid),
        "grid_predicted_over_measured": [trial.predicted / trial.measured().ratio for trial in grid],
    }


def grid_of(analysis: Analysis, exits: list[int], lengths: list[int]) -> list[Trial]:
    """Every (E, K), each with the draft vocabulary predicted best for it."""
    best: dict[tuple[int, int], tuple[Cell, float]] = {
        (one.cell.exit_layer, one.cell.draft_length): (one.cell, one.speedup)
        for one in reversed(analysis.cells)
    }
    return [Trial(*best[e, k]) for e in exits for k in lengths]


def prediction_of(trial: Trial) -> dict[str, Any]:
    """How far the predicted speed-up of a choice was from the measured one."""
    row = trial.record()
    ratio = row["predicted_speedup"] / row["speedup"]["ratio"]
    return {**row, "predicted_over_measured": ratio, "within_15_percent": abs(ratio - 1) <= BAND}


def against_best(choice: Trial, grid: list[Trial]) -> dict[str, Any]:
    """Compare a choice with the best cell of the grid: seconds of the one over those of the other."""
    best = max(grid, key=lambda trial: trial.measured().ratio)
    seconds = [[mean(x for _, x in one.seconds[prompt]) for prompt in best.seconds] for one in (best, choice)]
    found = ratio_of_sums(*seconds)
    return {
        "choice": choice.record(),
        "best": best.record(),
        "ratio": found.record(),
        "significantly_worse": found.high < 1,
    }


def show(result: dict[str, Any]) -> None:
    def line(row: dict[str, Any]) -> str:
        found = row["speedup"]
        sure = "" if row["policy"] == "fixed" else f", {row['policy']} {row['confidence'] or ''}".rstrip()
        return (
            f"{worded(row)}{sure}: "
            f"predicted {row['predicted_speedup']:.2f} x, measured {found['ratio']:.2f} x "
            f"[{found['ci95'][0]:.2f}, {found['ci95'][1]:.2f}], outputs equal {row['equal']} of {row['of']}"
        )

    for row in result["grid"]:
        print(line(row))
    choice, compared = result["doctor_choice"], result["tuned_against_best"]
    print(f"doctor: {line(choice)}; predicted / measured {choice['predicted_over_measured']:.2f}")
    ratio = compared["ratio"]
    worse = "significantly worse" if compared["significantly_worse"] else "not significantly worse"
    print(
        f"tuner:  {line(result['tuner_choice'])}; over the best of the grid {ratio['ratio']:.2f} "
        f"[{ratio['ci95'][0]:.2f}, {ratio['ci95'][1]:.2f}]: {worse}"
    )


if __name__ == "__main__":
    main()
