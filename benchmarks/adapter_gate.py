"""The gate before a long run of the exit adapter: what each setting learns from the same tokens, and its worth.

    python benchmarks/adapter_gate.py --train OWN.jsonl --held HELD.jsonl --work WORK --threads 2 --save
    python benchmarks/adapter_gate.py ... --seconds 60 --cells 0 1 2 3 6 --save     # after the same time

Lines are what `distill-data` wrote: prompts and the model's own greedy answers. One pass of the model gives the
states of all exits; every cell then trains an adapter on them with the same tokens and passes, and is judged on the
held-out answers: how often the first, second, ... draft is right where those before it were, tokens per round, and
the speed-up at the best K with the times of a draft and of a verification measured here. Exit layer 0 is the
embedding. States and finished cells are kept in the work folder, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import record
import torch
from gate_cells import CELLS, DRAFTS, Cell, judged, read, train

import layerskip
from layerskip.measure.records import work_folder
from layerskip.measure.results import named
from layerskip.model.step import Step
from layerskip.train.data.packing import most_frequent
from layerskip.train.objective.exit_adapter import ExitAdapter

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel

TURNS = 5  # of timing all cells, one behind the other


def draft_seconds(lm: LanguageModel, cell: Cell, repeats: int = 60) -> tuple[float, float]:
    """Median seconds of a draft (layers [0, E), adapter, draft head) and of its early pass alone."""
    stack = lm.stack
    cache, state = (
        stack.new_cache(1, 256),
        {
            k: v.bfloat16()
            for k, v in ExitAdapter(stack.width, 0, cell.blocks, cell.hidden).state_dict().items()
        },
    )
    adapter = stack.adapter(state, cell.exit_layer)
    head, token, times = stack.draft_head(cell.vocabulary, None, ()), torch.tensor([[5]]), []
    with torch.inference_mode():
        for i in range(repeats):
            step = Step.span([0], [128 + i % 8], [1], stack.device, spill=256)
            began = time.perf_counter()
            h, _ = stack.run(stack.embed(token, step), 0, cell.exit_layer, step, cache)
            early = time.perf_counter() - began
            stack.finished(z := adapter(h[:, 0], h[:, 0]))
            int(stack.logits(z, head).argmax())
            times.append((time.perf_counter() - began, early))
    return statistics.median(t for t, _ in times), statistics.median(e for _, e in times)


def worth(
    lm: LanguageModel, told: dict[str, Any], draft: float, early: float, plain: float
) -> dict[str, float]:
    """The best K and its speed-up: K drafts, an early pass, the other layers over K + 1 positions."""
    costs, found = lm.row_costs(), []
    for k, tokens in enumerate(told["tokens_per_round"], 1):
        found.append((tokens * plain / (k * draft + early + (plain - early) * costs(k + 1)), k))
    speedup, k = max(found)
    return {"speedup": speedup, "draft_length": k}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", action="append", type=Path, required=True)
    parser.add_argument("--held", action="append", type=Path, required=True, help="its stem names the kind")
    parser.add_argument("--model", default="smollm2-135m-base")
    parser.add_argument("--tokens", type=int, default=250_000, help="of answers to train on")
    parser.add_argument("--held-limit", type=int, default=30, help="lines of each held-out file")
    parser.add_argument("--length", type=int, default=768, help="of a sequence; the rest is left out")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="of training, for every cell, in place of epochs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", type=int, nargs="*", help="numbers of the cells to run; default: all")
    parser.add_argument("--work", type=Path, required=True, help="folder of finished cells")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lm = layerskip.load(given.model, dtype="bfloat16", device="cpu")
    lm.row_costs()
    cells = [CELLS[i] for i in given.cells] if given.cells else list(CELLS)
    cells = [replace(cell, vocabulary=min(cell.vocabulary, lm.stack.vocab_size)) for cell in cells]
    exits = sorted(
        {cell.exit_layer for cell in cells}
        | ({lm.stack.num_layers // 2} if any(c.middle for c in cells) else set())
    )
    lines, count = [], 0
    for line in itertools.chain.from_iterable(zip_longest(*(_lines(path) for path in given.train))):
        lines.append(line)
        count += sum(line["completion_mask"])
        if count >= given.tokens:
            break
    told = {
        name: value for name, value in vars(given).items() if name not in ("work", "cells", "save", "threads")
    }
    work_folder(given.work.absolute().parent, given.work.name, json.loads(json.dumps(told, default=str)))
    kept = given.work / f"states-{'-'.join(map(str, exits))}.pt"
    text = (
        torch.load(kept, weights_only=False) if kept.is_file() else read(lm.stack, lines, exits, given.length)
    )
    if not kept.is_file():
        torch.save(text, kept)
    held = {
        path.stem: read(lm.stack, _lines(path)[: given.held_limit], exits, given.length)
        for path in given.held
    }
    print(f"{count} tokens of answers, {len(lines)} sequences", flush=True)
    gain = lm.stack.finish.gain.float()
    head = lm.stack.table.float().bfloat16()
    labels = text.wanted[text.wanted >= 0].numpy()
    result: dict[str, Any] = {"tokens": count, "cells": {}}
    for cell in cells:
        file = given.work / f"{cell.name.replace(' ', '_').replace(',', '') or 'default'}.json"
        if not file.is_file():
            ids = torch.tensor(
                sorted(most_frequent(labels, cell.vocabulary, lm.eos_ids(layerskip.decode.options.Options())))
            )
            began = time.perf_counter()
            model, steps = train(cell, text, lm, gain, head, ids, given.epochs, given.seconds)
            seconds = time.perf_counter() - began
            told = {kind: judged(model, cell, part, gain, head, ids) for kind, part in held.items()}
            told["mean"] = {
                key: np.mean([one[key] for one in told.values()], 0).tolist()
                for key in ("agreement", "tokens_per_round")
            }
            file.write_text(json.dumps({"kinds": told, "train_s": seconds, "train_steps": steps}))
        result["cells"][cell.name] = {**asdict(cell), **json.loads(file.read_text())}
        print(f"{cell.name}: {_quality(result['cells'][cell.name])}", flush=True)
    turns = [(_plain(lm), [draft_seconds(lm, cell) for cell in cells]) for _ in range(TURNS)]
    result["plain_s"] = plain = statistics.median(turn for turn, _ in turns)
    for number, cell in enumerate(cells):
        draft, early = np.median([drafting[number] for _, drafting in turns], 0).tolist()
        told = result["cells"][cell.name]
        told |= {"draft_s": draft, "early_s": early, **worth(lm, told["kinds"]["mean"], draft, early, plain)}
        print(f"{cell.name}: {_quality(told)}; {_price(told)}", flush=True)
    result["configuration"] = record.configuration(given, torch.device("cpu"))
    if given.save:
        kind = "adapter-gate" if given.seconds is None else "adapter-ablation"
        record.save(result, kind, named(given.model))


def _plain(lm: LanguageModel) -> float:
    """Median seconds of a plain step at 128 tokens."""
    stack, times = lm.stack, []
    cache = stack.new_cache(1, 256)
    with torch.inference_mode():
        for i in range(40):
            step = Step.span([0], [128 + i % 8], [1], stack.device, spill=256)
            began = time.perf_counter()
            h, _ = stack.run(stack.embed(torch.tensor([[5]]), step), 0, stack.num_layers, step, cache)
            int(stack.logits(h[:, 0]).argmax())
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def zip_longest(*lists: list[Any]) -> Iterator[list[Any]]:
    """Take one of each list in turn, until all are empty."""
    for group in itertools.zip_longest(*lists):
        yield [one for one in group if one is not None]


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [line for line in lines if sum(line["completion_mask"]) > DRAFTS]


def _quality(told: dict[str, Any]) -> str:
    mean = told["kinds"]["mean"]
    right = " ".join(f"{share:.3f}" for share in mean["agreement"][:4])
    rounds = f"tokens per round {mean['tokens_per_round'][3]:.2f} (K 4)"
    return f"drafts right {right}; {rounds}; {told['train_s']:.0f} s"


def _price(told: dict[str, Any]) -> str:
    return f"{1000 * told['draft_s']:.2f} ms a draft; {told['speedup']:.2f} x at K {told['draft_length']}"


if __name__ == "__main__":
    main()
