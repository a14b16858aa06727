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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import record
import torch

import layerskip
from layerskip.measure.exits.states import _batches
from layerskip.measure.results import named
from layerskip.model.adapter import scaled
from layerskip.model.step import Step
from layerskip.train.data.encoding import IGNORED
from layerskip.train.data.packing import most_frequent
from layerskip.train.objective.exit_adapter import (
    STEP_WEIGHT,
    ExitAdapter,
    best_of,
    chained,
    places_of,
    runs_of,
)
from layerskip.train.objective.least_squares import POSITIONS, solution
from layerskip.train.objective.loss import multi_exit_loss

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.decode.language_model import LanguageModel
    from layerskip.model.stack import Stack

DRAFTS = 6
PART = 1024  # positions of a training step
TURNS = 5  # of timing all cells, one behind the other


@dataclass(frozen=True)
class Cell:
    """What is tried."""

    exit_layer: int = 1
    remembers: bool = True
    blocks: int = 1
    steps: int = 2
    loss: str = "kl"
    hidden: int = 1536
    vocabulary: int = 8192
    middle: bool = False  # the middle layer's state of the position before, for the first draft
    share: float = 1.0  # of the tokens
    start: str = "least squares"
    optimizer: str = "muon"
    rate: float = 3e-3

    @property
    def name(self) -> str:
        given = {key: value for key, value in asdict(self).items() if value != asdict(Cell())[key]}
        return ", ".join(f"{key} {value}" for key, value in given.items()) or "default"


CELLS = (
    Cell(remembers=False, blocks=0, steps=1),
    Cell(blocks=0, steps=1),
    Cell(steps=1),
    Cell(),
    Cell(steps=3),
    Cell(remembers=False),
    Cell(exit_layer=0),
    Cell(exit_layer=2),
    Cell(exit_layer=4),
    Cell(exit_layer=6),
    Cell(exit_layer=0, blocks=0),
    Cell(exit_layer=0, blocks=2),
    Cell(exit_layer=0, hidden=768, vocabulary=4096),
    Cell(hidden=768),
    Cell(loss="ce"),
    Cell(middle=True),
    Cell(vocabulary=4096),
    Cell(start="random"),
    Cell(optimizer="adamw", rate=1e-3),
    Cell(start="random", optimizer="adamw", rate=1e-3),
    Cell(share=0.5),
    Cell(share=0.25),
)


@dataclass
class Text:
    """Answers and the states along them, one behind the other, as a row of a batch: [1, T, D] each."""

    states: dict[int, Tensor]
    final: Tensor  # behind the final norm
    wanted: Tensor  # the next token where it is learnt, else IGNORED [T]
    positions: Tensor  # [1, T]
    starts: list[int]  # of the answers' sequences

    def part(self, first: int, last: int) -> Text:
        cut = {k: x[:, first:last] for k, x in self.states.items()}
        return Text(
            cut, self.final[:, first:last], self.wanted[first:last], self.positions[:, first:last], []
        )


@torch.inference_mode()
def read(stack: Stack, lines: list[dict[str, Any]], exits: list[int], limit: int) -> Text:
    """Run all layers over sequences once, and keep what the cells need of the answers."""
    found: list[tuple[dict[int, Tensor], Tensor, list[int], int]] = []
    sequences = [line["input_ids"][:limit] for line in lines]
    firsts = [max(0, line["completion_mask"].index(1) - 1 - DRAFTS) for line in lines]
    order = sorted(range(len(lines)), key=lambda i: len(sequences[i]))
    for group in _batches([len(sequences[i]) for i in order], 2048):
        rows = [order[place] for place in group]
        counts = [len(sequences[i]) for i in rows]
        cache, width = stack.new_cache(len(rows), max(counts)), max(counts)
        step = Step.span(range(len(rows)), [0] * len(rows), counts, stack.device, spill=width)
        padded = [[*sequences[i], *[sequences[i][-1]] * (width - len(sequences[i]))] for i in rows]
        embedded = stack.embed(torch.tensor(padded), step)
        h, taps = stack.run(embedded, 0, stack.num_layers, step, cache, taps=[k for k in exits if k])
        taps, final = {**taps, 0: embedded}, stack.finished(h)
        for row, i in enumerate(rows):
            part = slice(firsts[i], counts[row])
            kept = {k: taps[k][row, part].clone() for k in exits}
            found.append((kept, final[row, part].clone(), sequences[i], i))
    wanted, positions, starts, total = [], [], [], 0
    for _, final, tokens, i in found:
        own = lines[i]["completion_mask"][:limit]
        after = [*[t if m else IGNORED for t, m in zip(tokens, own, strict=True)][1:], IGNORED]
        wanted += after[firsts[i] :]
        positions += range(firsts[i], len(tokens))
        starts.append(total)
        total += len(final)
    states = {k: torch.cat([one[0][k] for one in found])[None] for k in exits}
    final = torch.cat([one[1] for one in found])[None]
    return Text(states, final, torch.tensor(wanted), torch.tensor([positions]), starts)


class WithMiddle(torch.nn.Module):
    """An adapter that reads a third state, of the middle layer one position before, where it is known."""

    def __init__(self, inner: ExitAdapter, width: int) -> None:
        super().__init__()
        self.inner, self.map, self.known = inner, torch.nn.Linear(width, width, bias=False), None
        torch.nn.init.zeros_(self.map.weight)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        z = self.inner(h, c)
        if self.known is None:
            return z
        known, self.known = self.known, None  # of the first draft alone
        return z + self.map(torch.nn.functional.rms_norm(known, known.shape[-1:]))


def drafts(
    model: Any, lm_read: Callable[[Tensor], Tensor], text: Text, cell: Cell, places: Tensor, steps: int
) -> list[Tensor]:
    """What the head reads of each draft; see `chained`."""
    early, final = text.states[cell.exit_layer].float(), text.final.float()
    if not cell.remembers:
        return chained(lambda h, c: model(h, torch.zeros_like(c)), lm_read, early, final, places, steps)
    if cell.middle:
        # `chained` asks for the states of `places` and those before them, in order: the middle's rows are the same.
        needed = torch.zeros(early.shape[1], dtype=torch.bool)
        for back in range(steps):
            needed[places - back] = True
        where = needed.nonzero()[:, 0]
        model.known = text.states[text_middle(text)][0, (where - 1).clamp(min=0)].float()
    return chained(model, lm_read, early, final, places, steps)


def text_middle(text: Text) -> int:
    return max(text.states)


def train(
    cell: Cell,
    text: Text,
    lm: LanguageModel,
    gain: Tensor,
    head: Tensor,
    ids: Tensor,
    epochs: int,
    seconds: float | None = None,
) -> tuple[Any, int]:
    """Train one cell and count its steps: so many passes, or seconds, over the same tokens in the same order."""
    began = time.perf_counter()
    # Sequences lie by length: a share of them is drawn.
    parts = list(_parts([*text.starts, len(text.wanted)]))
    parts = [parts[i] for i in np.random.default_rng(0).permutation(len(parts))]
    parts = parts[: round(cell.share * len(parts))]
    model: Any = ExitAdapter(head.shape[1], cell.exit_layer, cell.blocks, cell.hidden)
    if cell.start == "least squares":
        model.join.weight.data.copy_(linear(cell, text, parts, gain))
    model = WithMiddle(model, head.shape[1]) if cell.middle else model
    place_of = torch.full((lm.stack.vocab_size,), -1)
    place_of[ids] = torch.arange(len(ids))
    own = head[ids]
    total = epochs * len(parts)
    optimizer: Any = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=cell.rate, weight_decay=0.0, betas=(0.9, 0.95)),
        "muon": lambda p: torch.optim.Muon(
            p, lr=cell.rate, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
    }[cell.optimizer](model.parameters())

    def done(step: int) -> float:
        return step / total if seconds is None else (time.perf_counter() - began) / seconds

    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / 20) * 0.5 * (1 + np.cos(np.pi * min(1.0, done(t))))
    )
    weights = {cell.steps - i: STEP_WEIGHT**i for i in range(cell.steps)}
    weights = {key: weight / sum(weights.values()) for key, weight in weights.items()}
    step = 0
    for epoch in itertools.count():
        for which in np.random.default_rng(epoch).permutation(len(parts)):
            if done(step) >= 1:
                return model, step
            step += 1
            part = text.part(*parts[which])
            placed = torch.where(part.wanted >= 0, place_of[part.wanted.clamp(min=0)], -1)
            places = places_of((placed >= 0)[None, :-1], part.positions, max(cell.steps, DRAFTS))
            with torch.autocast("cpu", torch.bfloat16):
                states = drafts(model, lambda z: norm(z, gain), part, cell, places, cell.steps)
                by_key = {
                    cell.steps + 1: part.final[0, places],
                    **{cell.steps - i: x for i, x in enumerate(states)},
                }
                loss, _ = multi_exit_loss(by_key, placed[places], weights, own, exit_loss=cell.loss)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    raise AssertionError("time ends")


@torch.no_grad()
def linear(cell: Cell, text: Text, parts: list[tuple[int, int]], gain: Tensor) -> Tensor:
    """The best linear adapter, as `least_squares.solved` finds it: [D, 2 D]."""
    chosen, count = torch.zeros(len(text.wanted), dtype=torch.bool), 0
    for first, last in parts:
        chosen[first:last], count = True, count + last - first
        if count >= POSITIONS:
            break
    places = places_of((chosen & (text.wanted >= 0))[None, :-1], text.positions, 1)
    early, final = text.states[cell.exit_layer][0].float(), text.final[0].float()
    inputs = torch.cat((scaled(early[places]), scaled(final[places - 1]) * cell.remembers), -1)
    return solution(inputs.T @ inputs, inputs.T @ (final[places] / gain), len(places))


def norm(z: Tensor, gain: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(z.float(), z.shape[-1:], gain, 1e-5)


def _parts(bounds: list[int]) -> Iterator[tuple[int, int]]:
    """Cut at the answers' starts into parts of about PART positions."""
    first = bounds[0]
    for place in bounds[1:]:
        if place - first >= PART or place == bounds[-1]:
            yield first, place
            first = place


@torch.no_grad()
def judged(model: Any, cell: Cell, text: Text, gain: Tensor, head: Tensor, ids: Tensor) -> dict[str, Any]:
    """Agreement of each draft where those before it were right, and tokens per round by K."""
    hits, count = torch.zeros(DRAFTS), 0
    for first in range(0, len(text.wanted), 16 * PART):
        part = text.part(first, first + 16 * PART)
        places = places_of((part.wanted >= 0)[None, :-1], part.positions, DRAFTS)
        with torch.autocast("cpu", torch.bfloat16):
            states = drafts(model, lambda z: norm(z, gain), part, cell, places, DRAFTS)
        bits = [ids[best_of(x.to(head.dtype), head[ids], None)] == part.wanted[places] for x in states]
        hits += runs_of(bits, places, len(part.wanted))
        count += len(places)
    shares = [1.0, *(hits / count).tolist()]
    agreement = [after / max(before, 1e-9) for before, after in itertools.pairwise(shares)]
    return {"agreement": agreement, "tokens_per_round": list(itertools.accumulate(shares))[1:]}


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
    given.work.mkdir(parents=True, exist_ok=True)
    kept = given.work / "states.pt"
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
