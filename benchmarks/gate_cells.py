"""The cells of adapter_gate.py: what each is, how it learns from kept states, how often its drafts are right."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from layerskip.measure.exits.states import batches
from layerskip.model.adapter import scaled
from layerskip.model.step import Step
from layerskip.train.data.encoding import IGNORED
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
    for group in batches([len(sequences[i]) for i in order], 2048):
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
