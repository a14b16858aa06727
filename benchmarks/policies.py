"""Policies against each other: adaptive against the best fixed E and K, guarded drafting against plain decoding.

    python benchmarks/policies.py --model M --prompts a.jsonl --prompts b.jsonl --limit 6 --save
    python benchmarks/policies.py --model smollm2-135m-base --threads 2 --save          # untrained exits: the guard

The prompts are decoded for exactly --max-new-tokens each, end of sequence disabled. First every fixed (E, K)
of the grid decodes all of them once, in turn; the fastest is then measured afresh, in turn with plain
decoding and with the policies. A policy is measured twice: kept from prompt to prompt, as in a server, and
fresh for every prompt, as when a command is called. An output that is not plain decoding's ends the
measurement. Picking the best of a grid on the very prompts that are then measured favours the fixed choice.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import record
import torch

import layerskip
from layerskip.cli.prompts import encoded, unescaped
from layerskip.decode.options import Options
from layerskip.measure import prompt_file
from layerskip.measure.intervals import interval, ratios
from layerskip.measure.lines import read_prompts
from layerskip.measure.speed import methods as ways
from layerskip.measure.speed.bench import schedule
from layerskip.measure.speed.methods import Method, Run

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel

Prompts = list[tuple[str, list[int]]]  # name of the file, tokens
FIXED = "fixed"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-base")
    parser.add_argument("--prompts", type=Path, action="append", help="JSON lines; default: the ten built in")
    parser.add_argument("--limit", type=int, default=6, help="prompts of each file")
    parser.add_argument("--skip", type=int, default=0, help="prompts of each file that were used for tuning")
    parser.add_argument(
        "--separator", default="", help="ends text prompts; TOPv2 was trained with a line break"
    )
    parser.add_argument("--no-chat", action="store_true", help="text prompts as they are")
    parser.add_argument("--exits", default="", help="comma-separated; default: trained exits, else a quarter")
    parser.add_argument("--draft-lengths", default="2,4,8")
    parser.add_argument("--draft-vocab", default="auto")
    parser.add_argument("--confidence", type=float, default=None)
    parser.add_argument("--no-fixed", action="store_true", help="leave the best fixed out of the second part")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lm = layerskip.load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    prompts = read(lm, arguments)
    vocab = int(arguments.draft_vocab) if arguments.draft_vocab.isdecimal() else arguments.draft_vocab
    plan = lm.plan(Options(mode="self-speculative"))
    exits = numbers(arguments.exits) or list(lm.facts.exits) or [plan.exit_layer]
    common = {"draft_vocab": vocab}

    plain = ways.ours(lm, "ar", 0)
    grid = {
        f"{FIXED} {e}x{k}": ways.ours(
            lm, "self-speculative", 0, policy=FIXED, exit_layer=e, draft_length=k, **common
        )
        for e in exits
        for k in numbers(arguments.draft_lengths)
    }
    budget = arguments.max_new_tokens
    wanted = [plain.decode(i, tokens, budget).tokens for i, (_, tokens) in enumerate(prompts)]
    chosen = timed([*grid.values()], [*grid], prompts, budget, 1, wanted)
    rates = {name: interval(speeds(runs)).median for name, runs in chosen.items()}
    best = max(rates, key=lambda name: rates[name])
    e, k = (int(x) for x in best.split()[1].split("x"))

    contestants = {"ar": plain} if arguments.no_fixed else {"ar": plain, best: grid[best]}
    given = {"exit_layer": e, "draft_length": k, **common}
    policies: dict[str, dict[str, Any]] = {
        "fixed, guarded": {"policy": FIXED, "guard": True},
        "confidence": {"policy": "confidence", "confidence": arguments.confidence},
        "adaptive": {"policy": "adaptive"},
    }
    for name, options in policies.items():
        contestants[name] = ways.ours(lm, "self-speculative", 0, **given, **options)
        contestants[f"{name}, fresh"] = fresh(lm, given | options)
    runs = timed([*contestants.values()], [*contestants], prompts, budget, arguments.trials, wanted)
    rates_by = {name: speeds(own) for name, own in runs.items()}
    table = {
        name: {
            "tokens_per_s": interval(rates_by[name]).median,
            "over_plain": told(rates_by[name], rates_by["ar"]),
            "over_best_fixed": None if best not in runs else told(rates_by[name], rates_by[best]),
            "acceptance": acceptance(runs[name]),
            "choices": choices(runs[name]),
            "over_plain_by_file": {
                file: told(*(part(rates_by[x], prompts, file) for x in (name, "ar")))
                for file in dict.fromkeys(name for name, _ in prompts)
            },
        }
        for name in contestants
    }
    result = {
        "best_fixed": {"exit_layer": e, "draft_length": k},
        "grid_tokens_per_s": rates,
        "methods": table,
        "prompts": len(prompts),
        "equal": len(prompts),  # `timed` stops at the first output that is not plain decoding's
        "trained_exits": list(lm.facts.exits),
        "configuration": record.configuration(arguments, lm.stack.device),
    }
    result["configuration"]["dtype"] = str(lm.stack.dtype).removeprefix("torch.")
    show(result)
    if arguments.save:
        name = Path(arguments.model).resolve().name if Path(arguments.model).exists() else arguments.model
        record.save(result, "policies", name, result["configuration"]["dtype"], lm.stack.device.type)


def read(lm: LanguageModel, arguments: argparse.Namespace) -> Prompts:
    """Take the files in turn, so that kinds of text alternate."""
    files = []
    for path in arguments.prompts or [prompt_file()]:
        lines = read_prompts(path)[arguments.skip :][: arguments.limit]
        chat = False if arguments.no_chat else lm.has_template
        separator = unescaped(arguments.separator)
        files.append([(path.name, encoded(lm, line.content, chat, separator)) for line in lines])
    longest = max(map(len, files))
    return [file[i] for i in range(longest) for file in files if i < len(file)]


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def fresh(lm: LanguageModel, options: dict[str, Any]) -> Method:
    """A policy that has forgotten what it learnt, for every prompt."""
    method = ways.ours(lm, "self-speculative", 0, **options)

    def decode(index: int, prompt: list[int], budget: int) -> Run:
        kept = dict(lm.controllers)
        lm.controllers.clear()
        try:
            return method.decode(index, prompt, budget)
        finally:
            lm.controllers.clear()
            lm.controllers.update(kept)

    return Method(method.name, decode, 0)


def timed(
    methods: Sequence[Method],
    names: Sequence[str],
    prompts: Prompts,
    budget: int,
    trials: int,
    wanted: Sequence[list[int]],
) -> dict[str, list[list[Run]]]:
    """Decode in turn; runs by method, [prompt][trial]. Stops at an output that is not plain decoding's."""
    runs: list[list[list[Run]]] = [[[] for _ in prompts] for _ in methods]
    for method in methods:
        method.decode(0, prompts[0][1], 24)  # warms up
    total = trials * len(prompts) * len(methods)
    for done, (_, prompt, at) in enumerate(schedule(trials, len(prompts), len(methods))):
        run = methods[at].decode(prompt, prompts[prompt][1], budget)
        if run.tokens != wanted[prompt]:
            raise SystemExit(f"{names[at]}: output {prompt + 1} is not that of plain decoding")
        runs[at][prompt].append(run)
        if done % 20 == 0:
            print(f"{done} of {total}", file=sys.stderr, flush=True)
    return dict(zip(names, runs, strict=True))


def speeds(runs: Sequence[Sequence[Run]]) -> list[list[float]]:
    return [[run.decode_tokens_per_s for run in own] for own in runs]


def told(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> dict[str, Any]:
    return interval(ratios(above, below)).record()


def part(values: Sequence[Any], prompts: Prompts, file: str) -> list[Any]:
    return [value for value, (name, _) in zip(values, prompts, strict=True) if name == file]


def rounds_of(runs: Sequence[Sequence[Run]]) -> list[Any]:
    return [r for own in runs for run in own for r in run.rounds if r.source != "prefill"]


def acceptance(runs: Sequence[Sequence[Run]]) -> float | None:
    rounds = rounds_of(runs)
    drafted = sum(r.drafted for r in rounds)
    return sum(r.accepted for r in rounds) / drafted if drafted else None


def choices(runs: Sequence[Sequence[Run]]) -> dict[str, int]:
    """How many rounds of each kind: ExK, or plain."""
    counts: dict[str, int] = {}
    for r in rounds_of(runs):
        kind = "plain" if r.source == "plain" else f"{r.exit_layer}x{r.draft_length}"
        counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def show(result: dict[str, Any]) -> None:
    print(f"all outputs equal plain decoding's ({result['prompts']} prompts)")
    for name, row in result["methods"].items():
        most = ", ".join(f"{kind} {count}" for kind, count in [*row["choices"].items()][:4])
        ratios = [
            f"{what} {x['median']:.3f} [{x['ci95'][0]:.3f}, {x['ci95'][1]:.3f}]"
            for what, x in (("over plain", row["over_plain"]), ("over best fixed", row["over_best_fixed"]))
            if x is not None
        ]
        print(f"{name:<22} {row['tokens_per_s']:7.1f} tokens/s  {'  '.join(ratios)}  {most}")


if __name__ == "__main__":
    record.run(main)
