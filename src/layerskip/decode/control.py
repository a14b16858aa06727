"""Who chooses E and K of each round: fixed, by confidence, adaptive; and when plain steps would be faster.

    controller = Controller(prices, arms, trained=True, guard=True)
    choice = controller.choice(num_rows)       # what the next round does
    controller.learn(choice, seconds, rows)    # what it gave

A controller sees counts and seconds of rounds that are over. The next token's law does not depend on how it was
drafted, so no choice made before a round can change what is said. Within a round drafting stops by q alone, before
the token is drawn: acceptance is exact for any q (arXiv 2211.17192), while dropping drawn tokens would be biased.

Tokens a round are expected from the agreement of each exit with the full model, which judged drafts tell and, for
exits not in use, probes: states that pass by anyway, read by the draft head now and then (DEL, arXiv 2504.05598).
Seconds a round are its price in layers times the measured pace, the median of the last few rounds.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from layerskip.model.cost import Cost, expected_tokens

if TYPE_CHECKING:
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack

WINDOW = 96  # tokens after which an observation counts 1/e: a paragraph or two
PRIOR = 4.0  # judged positions, or tokens, that a first guess weighs
TRAINED, UNTRAINED = 0.8, 0.05  # agreement guessed before anything was seen
MARGIN = 1.03  # another way must look this much faster to be taken
PROBE_SHARE = 0.005  # of the time may go into probes
PLAIN_EVERY = 64  # rounds between plain steps that measure what plain decoding would take
FEWEST = 2  # timed rounds to know a pace; the very first of a kind warms up and is not counted
PATIENCE = 128  # plain steps after which it is forgotten how slow drafting was; doubles while it stays slow
LONGEST = 16  # tokens drafted at most by a controller's own choice


@dataclass(frozen=True)
class Choice:
    """What a round does. `exit_layer` = all layers with `draft_length` 0 is a plain step."""

    exit_layer: int
    draft_length: int
    confidence: float = 0.0  # stop before drawing where the draft head's largest probability is below
    probes: tuple[int, ...] = ()  # exits whose agreement is looked at on the way
    drafter: str = "exit"  # a name in `drafters.DRAFTERS`


class Drafted(NamedTuple):
    """What a round did for one row; `agreements` maps probed exits to (positions agreed, positions seen)."""

    drafted: int
    kept: int
    committed: int
    agreements: Mapping[int, tuple[float, int]]


@dataclass(frozen=True)
class Prices:
    """What a step costs before anything was timed, in layers: bytes of heads over bytes of a layer."""

    layers: int
    head: float
    draft_head: float

    @classmethod
    def of(cls, stack: Stack, draft_head: Head | None) -> Prices:
        head = stack.head_bytes / stack.layer_bytes
        share = 1.0 if draft_head is None else draft_head.size / stack.vocab_size
        return cls(stack.num_layers, head, head * share)

    @property
    def plain(self) -> float:
        return self.layers + self.head

    def cost(self, exit_layer: int) -> Cost:
        return Cost(self.layers, exit_layer, self.head, self.draft_head)

    def round(self, exit_layer: int, draft_length: int) -> float:
        return self.plain if exit_layer == self.layers else self.cost(exit_layer).round(draft_length)


def arms(
    exit_layer: int, draft_length: int, confidence: float, exits: Sequence[int], adaptive: bool
) -> tuple[Choice, ...]:
    """List the (E, K) a controller may choose from: the given one, or a menu of up to 4 x 4 around it.

    `exits` are those worth trying: the trained ones, or all below the last layer.
    """
    if not adaptive:
        return (Choice(exit_layer, draft_length, confidence),)
    wanted = (exit_layer, exit_layer // 2, exit_layer * 3 // 2, exit_layer * 2)
    depths = {exit_layer, *(min(exits, key=lambda k: (abs(k - w), k)) for w in wanted)}
    longest = max(draft_length, LONGEST)
    lengths = {max(1, draft_length // 4), max(1, draft_length // 2), draft_length, 2 * draft_length}
    return tuple(Choice(e, min(k, longest), confidence) for e in sorted(depths) for k in sorted(lengths))


class _Fading:
    """Two sums whose ratio is wanted, in which what was seen long ago counts less."""

    def __init__(self) -> None:
        self.total, self.weight = 0.0, 0.0

    def add(self, total: float, weight: float, window: float) -> None:
        self.fade(weight, window)
        self.total, self.weight = self.total + total, self.weight + weight

    def fade(self, passed: float, window: float) -> None:
        keep = math.exp(-passed / window)
        self.total, self.weight = keep * self.total, keep * self.weight


class _Book:
    """What rounds of one number of rows have taken: seconds per layer of price, by arm."""

    def __init__(self) -> None:
        self.known: set[Choice] = set()
        self.paces: dict[Choice, deque[float]] = defaultdict(lambda: deque(maxlen=7))
        self.drafting: deque[float] = deque(maxlen=16)  # of all arms that draft

    def add(self, arm: Choice, pace: float, drafts: bool) -> None:
        if arm in self.known:  # the first round of a kind may capture a graph, or pack weights
            self.paces[arm].append(pace)
            if drafts:
                self.drafting.append(pace)
        self.known.add(arm)

    def pace(self, arm: Choice, plain: Choice) -> float | None:
        """The arm's own, else that of arms like it, else of plain steps; None when nothing was timed."""
        own = self.paces[arm] if len(self.paces[arm]) >= FEWEST else None
        known = own or (arm != plain and self.drafting) or self.paces[plain]
        return statistics.median(known) if known else None

    def forget_drafting(self, plain: Choice) -> None:
        self.drafting.clear()
        for arm in [arm for arm in self.paces if arm != plain]:
            del self.paces[arm]


class Controller:
    """Choose what a round does, by tokens per measured second. One controller serves all rows of its kind.

    `guard` makes plain steps one more choice, taken while they are faster; without it a controller always drafts.
    """

    def __init__(
        self, prices: Prices, arms: Sequence[Choice], *, trained: bool = False, guard: bool = True
    ) -> None:
        assert arms
        self.prices, self.arms, self.guard = prices, tuple(arms), guard
        self.plain = Choice(prices.layers, 0)
        self.exits = tuple(sorted({arm.exit_layer for arm in arms}))
        self.prior = TRAINED if trained else UNTRAINED
        self._agreement = {exit_layer: _Fading() for exit_layer in self.exits}
        # Tokens of rounds against those expected: drafts are not kept independently of each other.
        self._surplus = _Fading()
        self._books: dict[int, _Book] = defaultdict(_Book)
        self._current: Choice | None = None
        self._since_plain = self._since_probe = self._num_probes = 0
        self._plain_run, self._patience = 0, PATIENCE

    # -- what is known ---------------------------------------------------------------------------------------

    def agreement(self, exit_layer: int) -> float:
        """Estimate how often the exit agrees with the full model, per token, lately."""
        seen = self._agreement[exit_layer]
        return (seen.total + PRIOR * self.prior) / (seen.weight + PRIOR)

    def tokens_per_s(self, arm: Choice, num_rows: int = 1) -> float:
        """Estimate an arm's tokens per second and row; in layers instead of seconds while nothing was timed."""
        pace = self._books[_bucket(num_rows)].pace(arm, self.plain) or 1.0
        if arm == self.plain:
            return 1.0 / (pace * self.prices.plain)
        surplus = (self._surplus.total + PRIOR) / (self._surplus.weight + PRIOR)
        return self._tokens_per_price(arm) * surplus / pace

    def _tokens_per_price(self, arm: Choice) -> float:
        expected = expected_tokens(arm.draft_length, self.agreement(arm.exit_layer))
        return expected / self.prices.round(arm.exit_layer, arm.draft_length)

    # -- choosing --------------------------------------------------------------------------------------------

    def choice(self, num_rows: int = 1) -> Choice:
        """Choose for the next round of `num_rows` rows. Changes nothing: `learn` does."""
        paces = self._books[_bucket(num_rows)].paces
        if self.guard and len(paces[self.plain]) < FEWEST:
            return self.plain
        rates = {arm: self.tokens_per_s(arm, num_rows) for arm in self.arms}
        best = max(self.arms, key=lambda arm: rates[arm] * (MARGIN if arm == self._current else 1.0))
        if self.guard:
            drafting = self._current in self.arms
            bar = self.tokens_per_s(self.plain, num_rows) * (1.0 if drafting else MARGIN)
            if rates[best] < bar:
                due = self._since_probe >= min(4 * self._num_probes, self._probe_every(self.plain))
                return replace(self.plain, probes=self.exits) if due else self.plain
            if self._since_plain >= PLAIN_EVERY:
                return self.plain
        others = tuple(exit_layer for exit_layer in self.exits if exit_layer != best.exit_layer)
        if others and self._since_probe >= max(8, self._probe_every(best)):
            return replace(best, probes=others)
        return best

    def _probe_every(self, arm: Choice) -> int:
        """Rounds between probes: each reads the draft head once."""
        price = self.prices.round(arm.exit_layer, arm.draft_length)
        return math.ceil(self.prices.draft_head / (PROBE_SHARE * price))

    # -- learning --------------------------------------------------------------------------------------------

    def learn(self, choice: Choice, seconds: float, rows: Sequence[Drafted]) -> None:
        """Take in what a round gave and how long it took."""
        arm, book = replace(choice, probes=()), self._books[_bucket(len(rows))]
        drafted = max(row.drafted for row in rows)
        price = self.prices.round(arm.exit_layer, drafted)
        plain = arm == self.plain
        if not choice.probes:  # a probe's time is not the arm's
            book.add(arm, seconds / price, drafts=not plain)
        measured_only = plain and self._since_plain >= PLAIN_EVERY  # drafting goes on after it
        self._current = self._current if measured_only else arm
        self._since_plain = 0 if plain else self._since_plain + 1
        self._since_probe = 0 if choice.probes else self._since_probe + 1
        self._num_probes += bool(choice.probes)
        for exit_layer in choice.probes:
            hits, seen = (sum(row.agreements[exit_layer][i] for row in rows) for i in (0, 1))
            self._agreement[exit_layer].add(hits, seen, WINDOW)
        if plain:
            self._surplus.fade(1.0, WINDOW / 4)
            self._plain_run += not measured_only
            if self._plain_run >= self._patience:  # it may have been slow for a reason that is gone
                book.forget_drafting(self.plain)
                self._plain_run, self._patience = 0, 2 * self._patience
            return
        if self._since_plain >= PLAIN_EVERY // 2:
            self._patience = PATIENCE
        self._plain_run = 0
        judged = sum(min(row.kept + 1, row.drafted) for row in rows)
        self._agreement[arm.exit_layer].add(sum(row.kept for row in rows), judged, WINDOW)
        if arm.confidence:
            expected = len(rows) * price * self._tokens_per_price(arm)
        else:  # by what was drafted: a draft may have been cut by the end of the output
            agreement = self.agreement(arm.exit_layer)
            expected = sum(expected_tokens(row.drafted, agreement) for row in rows)
        self._surplus.add(sum(row.committed for row in rows), expected, WINDOW)


def _bucket(num_rows: int) -> int:
    """Numbers of rows that are timed together: powers of two."""
    return 1 << max(0, num_rows - 1).bit_length()
