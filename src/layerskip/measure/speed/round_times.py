"""How long whole rounds take on this device, the engine's own work included: a few measured, the rest between them.

    times = round_times(lm, context, exits=[4, 8, 12], lengths=[1, 4, 8], sizes=[0, 4096])
    times.medians().seconds(exit_layer=6, size=4096)        # [1, 9]: a round of 0..8 drafts

Each measured round starts from the same context: its row's cache is kept, so that only the last token of the
prompt runs again before it. All settings take turns, so that a disturbance meets them alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from layerskip.decode.engine import Engine
from layerskip.decode.options import Options
from layerskip.decode.scheduler import Scheduler, raising
from layerskip.watch import Watch, silent

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel
    from layerskip.decode.request import Round
    from layerskip.decode.scheduler import Ticket

TURNS = 9
WARM_UP = 2  # turns; on CUDA the first one captures graphs


@dataclass(frozen=True)
class RoundTimes:
    """Seconds of rounds, one value per turn. Shapes: R turns, X exits, Y draft lengths, the first of them 0."""

    exits: tuple[int, ...]
    lengths: tuple[int, ...]
    rounds: np.ndarray  # [R, X, Y], with the reference's draft head
    # By size of the draft vocabulary, [R]: what a draft costs over the reference.
    per_draft: dict[int, np.ndarray]

    def medians(self, turns: np.ndarray | None = None) -> Medians:
        """Take medians over turns: all of them once, or drawn ones, int64 [draws, R]."""
        if turns is None:
            turns = np.arange(len(self.rounds))[None]
        per_draft = {size: np.median(values[turns], axis=1) for size, values in self.per_draft.items()}
        return Medians(self.exits, self.lengths, np.median(self.rounds[turns], axis=1), per_draft)

    def resampled(self, draws: int, rng: np.random.Generator) -> Medians:
        """Bootstrap the turns; what was measured in one turn stays together."""
        turns = len(self.rounds)
        return self.medians(rng.integers(turns, size=(draws, turns)))


@dataclass(frozen=True)
class Medians:
    """Median seconds, one set per draw."""

    exits: tuple[int, ...]
    lengths: tuple[int, ...]
    rounds: np.ndarray  # [draws, X, Y]
    per_draft: dict[int, np.ndarray]  # [draws]

    @property
    def plain(self) -> np.ndarray:
        """A plain step: [draws]."""
        return self.rounds[:, 0, 0]

    def seconds(self, exit_layer: int, size: int) -> np.ndarray:
        """Seconds of rounds with 0, 1, 2 ... drafts: [draws, longest + 1], linear between what was measured."""
        drafts = np.arange(self.lengths[-1] + 1)
        across = _weights(np.array([exit_layer]), self.exits)[0]  # [X]
        along = _weights(drafts, self.lengths)  # [longest + 1, Y]
        reference = np.einsum("x,nxy,ky->nk", across, self.rounds, along)
        made: np.ndarray = reference + self.per_draft[size][:, None] * drafts
        return made


def round_times(
    lm: LanguageModel,
    context: Sequence[int],
    exits: Sequence[int],
    lengths: Sequence[int],
    sizes: Sequence[int],
    batch_size: int = 1,
    turns: int | None = None,
    watch: Watch = silent,
) -> RoundTimes:
    """Measure rounds at every one of `exits` x `lengths`, and at one of them every draft vocabulary (0: none).

    The reference vocabulary, with which the grid is measured, is the middle one.
    """
    turns = TURNS if turns is None else turns
    reference = sorted(sizes)[len(sizes) // 2]
    repeated = {size: _RepeatedRounds(lm, context, size, max(lengths), batch_size) for size in sizes}
    middle, longest = exits[len(exits) // 2], max(lengths)
    plain = (reference, lm.stack.num_layers, 0)
    grid = [[(reference, e, k) for k in lengths] for e in exits]
    others = {size: (size, middle, longest) for size in sizes}
    work = list(dict.fromkeys([plain, *(cell for line in grid for cell in line), *others.values()]))
    taken: dict[tuple[int, int, int], list[float]] = {cell: [] for cell in work}
    for turn in range(WARM_UP + turns):
        watch("timing rounds", turn, WARM_UP + turns)
        for cell in work:
            size, exit_layer, draft_length = cell
            taken[cell].append(repeated[size].round_s(exit_layer, draft_length))
    watch("timing rounds", WARM_UP + turns, WARM_UP + turns)
    seconds = {cell: np.array(values[WARM_UP:]) for cell, values in taken.items()}
    rounds = np.array([[seconds[plain], *(seconds[cell] for cell in line)] for line in grid])  # [X, Y, R]
    per_draft = _per_draft(
        {size or lm.stack.vocab_size: seconds[cell] / longest for size, cell in others.items()},
        reference or lm.stack.vocab_size,
    )
    by_size = {size: per_draft[size or lm.stack.vocab_size] for size in sizes}
    return RoundTimes(tuple(exits), (0, *lengths), np.moveaxis(rounds, -1, 0), by_size)


def _per_draft(seconds: dict[int, np.ndarray], reference: int) -> dict[int, np.ndarray]:
    """What a draft costs more with so many rows of the head than with the reference's, [R] each.

    A head reads its rows, so its time is a line over their number; fitting one keeps noise from ordering sizes.
    """
    if len(seconds) == 1:
        return {size: np.zeros_like(values) for size, values in seconds.items()}
    slope = np.polyfit(list(seconds), np.stack(list(seconds.values())), 1)[0].clip(min=0)  # [R]
    return {size: slope * (size - reference) for size in seconds}


class _RepeatedRounds:
    """An engine whose rows hold a context, on which a round of any E and K can be run again and again."""

    def __init__(
        self, lm: LanguageModel, context: Sequence[int], size: int, longest: int, batch_size: int
    ) -> None:
        self.lm = lm
        # With several rows, those prefilled first make rounds while the others wait, one a chunk.
        self.room = (longest + 1) * (batch_size * math.ceil(len(context) / lm.stack.prefill_chunk) + 1)
        most = (lm.stack.context or len(context) + self.room) - self.room
        self.context = list(context[-most:] if most > 0 else context[-1:])
        capacity = min(len(self.context) + self.room, lm.stack.context or 1 << 62)
        head = lm.draft_head(Options.parse({"draft_vocab": size or "off"}))
        engine = Engine(lm.stack, rows=batch_size, capacity=capacity, draft_head=head)
        self.scheduler = Scheduler(engine)
        self.tickets: list[Ticket | None] = [None] * batch_size

    def round_s(self, exit_layer: int, draft_length: int) -> float:
        """Time one round of all rows."""
        drafting = {"mode": "self-speculative", "exit_layer": exit_layer, "draft_length": draft_length}
        options: dict[str, Any] = {
            **(drafting if draft_length else {"mode": "ar"}),
            "max_new_tokens": self.room,
            "eos_token_id": [],
            "seed": 0,
        }
        request = self.lm.call(Options.parse(options)).request(self.context, keep=True)
        tickets = [self.scheduler.submit(request, ticket) for ticket in self.tickets]
        waiting = set(tickets)
        while waiting:
            # A chunk of a long prompt commits nothing: its row is not ready yet.
            waiting -= {
                ticket for ticket, round in self._step() if round.source == "prefill" and round.tokens
            }
        began = time.perf_counter()
        self._step()
        seconds = time.perf_counter() - began
        for ticket in tickets:
            self.scheduler.pause(ticket)
        self.tickets = list(tickets)
        return seconds

    def _step(self) -> list[tuple[Ticket, Round]]:
        return list(raising(self.scheduler.step()))


def _weights(places: np.ndarray, nodes: Sequence[int]) -> np.ndarray:
    """Linear interpolation as a matrix: [len(places), len(nodes)]; beyond the ends the end counts."""
    return np.stack([np.interp(places, nodes, unit) for unit in np.eye(len(nodes))], axis=-1)
