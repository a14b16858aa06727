"""Who chooses what a round does: which exit drafts and how much, or a copy, or nothing where that is faster.

    controller = Controller(prices, arms, copying=Copying(), trained=True, guard=True)
    choices = controller.choose(chances)       # what the next round does, row by row
    controller.learn(choice, seconds, rows)    # what it gave

A controller sees counts and seconds of rounds that are over. The next token's law does not depend on how it was
drafted, so no choice made before a round can change what is said. Within a round drafting stops by q alone, before
the token is drawn: acceptance is exact for any q (arXiv 2211.17192), while dropping drawn tokens would be biased.

Tokens a round are expected from the agreement of each exit with the full model, which judged drafts tell and, for
exits not in use, probes: states that pass by anyway, read by the draft head now and then (DEL, arXiv 2504.05598).
Seconds a round are its price in layers times the measured pace, the median of the last few rounds. A controller
that is not timed goes by prices alone: its choices are a function of the tokens committed, so a seed repeats.

What a copy would be worth is known of every row at every token (`History`), so it is chosen row by row and never
tried out. A step reads the weights once for all its rows, so they draft in one way together: those that can copy
do, beside plain steps of the others, where that brings all of them more tokens per price than drafts of an exit.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from layerskip.decode.copies import best_lengths
from layerskip.model.cost import FLAT_ROW_COSTS, Cost, RowCosts, expected_tokens

if TYPE_CHECKING:
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack

WINDOW = 96  # tokens after which an observation counts 1/e: a paragraph or two
PRIOR = 4.0  # judged positions, or tokens, that a first guess weighs
# The same of a trained adapter that runs no layer: its drafts cost so little that a bad start is no reason to give
# it up (docs/notebook.md, 2026-11-30). It keeps a quarter of the weight: WINDOW observations count at most.
FIRM = 32.0
TRAINED, UNTRAINED = 0.5, 0.05  # agreement guessed before anything was seen
MARGIN = 1.03  # another way must look this much faster to be taken
PROBE_SHARE = 0.005  # of the time may go into probes
PLAIN_EVERY = 64  # rounds between plain steps that measure what plain decoding would take
PLAIN_FIRST = 32  # the same while that is not known yet: 1% of the time at most goes into looking
MANY = 4  # rows, from which on one does not look for drafts every round where plain steps were best
MANY_MARGIN = 1.1  # copies of many rows must seem to gain this much: the best of many guesses is too high
FIRST_REST, LONGEST_REST = 3, 15  # rounds until one looks again, more while plain steps stay best
FEWEST = 2  # timed rounds to know a pace; the very first of a kind warms up and is not counted
PATIENCE = 128  # plain steps after which it is forgotten how slow drafting was; doubles while it stays slow
LONGEST = 16  # tokens drafted at most by a controller's own choice
OVERDUE = 4  # copies may put a probe off until it is that late
CHEAPEST = 0.25  # of the modelled price: a clock that says less is wrong
EXIT, LOOKUP = "exit", "lookup"  # the two drafters that a controller knows


@dataclass(frozen=True)
class Choice:
    """What a round does. `exit_layer` = all layers with `draft_length` 0 is a plain step."""

    exit_layer: int
    draft_length: int
    confidence: float = 0.0  # stop before drawing where the draft head's largest probability is below
    probes: tuple[int, ...] = ()  # exits whose agreement is looked at on the way
    drafter: str = EXIT  # a name in `drafters.DRAFTERS`
    costs: RowCosts | None = None  # cut greedy drafts where one more costs more than it is likely to bring
    unseen: bool = False  # a plain step at rest, of which nothing is learnt but that it was

    @property
    def source(self) -> str:
        """Who drafts: a plain step is a copy of no token, so it shares rounds with rows that copy."""
        return self.drafter if self.draft_length else LOOKUP


@dataclass(frozen=True)
class Copying:
    """When a row copies from its own text: behind matches of at least `shortest` tokens, `longest` at most.

    `padded`: rows of a step are as wide as the widest, so a copied token adds a position to each of them.
    """

    shortest: int = 1
    longest: int = LONGEST
    costs: RowCosts = FLAT_ROW_COSTS
    padded: bool = False


class Drafted(NamedTuple):
    """What a round did for one row; `agreements` maps probed exits to (positions agreed, positions seen)."""

    drafted: int
    kept: int
    committed: int
    agreements: Mapping[int, tuple[float, int]]


@dataclass(frozen=True)
class Prices:
    """What a step costs before anything was timed, in layers: bytes of heads over bytes of a layer.

    `rows` prices the positions that are verified together; None: as one.
    """

    layers: int
    head: float
    draft_head: float
    rows: RowCosts | None = None

    @classmethod
    def of(cls, stack: Stack, draft_head: Head | None, rows: RowCosts | None = None) -> Prices:
        head = stack.head_bytes / stack.layer_bytes
        share = 1.0 if draft_head is None else draft_head.size / stack.vocab_size
        adapter = None if draft_head is None else draft_head.adapter
        more = 0.0 if adapter is None else adapter.num_bytes / stack.layer_bytes
        return cls(stack.num_layers, head, head * share + more, rows)

    def cost(self, exit_layer: int, draft_length: int = 0, num_rows: int = 1) -> Cost:
        one, several = (1.0 if self.rows is None else self.rows(num_rows * n) for n in (1, draft_length + 1))
        late, head = several * (self.layers - exit_layer), several * self.head
        whole, early, plain_head, draft = (
            one * part for part in (self.layers, exit_layer, self.head, self.draft_head)
        )
        return Cost(whole, early, plain_head, draft, late, head)

    def round(self, exit_layer: int, draft_length: int, num_rows: int = 1) -> float:
        """Price a round of an exit, of so many rows together; with all layers it is a plain step."""
        cost = self.cost(exit_layer, draft_length, num_rows)
        return cost.layers + cost.head if exit_layer == self.layers else cost.round(draft_length)


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
    reached = sorted({min(k, longest) for k in lengths})
    return tuple(Choice(e, k, confidence) for e in sorted(depths) for k in reached)


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
    """What rounds of one number of rows have taken: seconds per layer of price, by arm.

    `extra` holds, of the last rounds with copies, what these added to a plain step and what they should have added,
    in plain steps.
    """

    def __init__(self) -> None:
        self.extra: deque[tuple[float, float]] = deque(maxlen=24)
        self.known: set[Choice] = set()
        self.paces: dict[Choice, deque[float]] = defaultdict(lambda: deque(maxlen=7))
        # Of all arms of a drafter.
        self.drafting: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=16))

    def add(self, arm: Choice, pace: float) -> None:
        if arm in self.known:  # the first round of a kind may capture a graph, or pack weights
            self.paces[arm].append(pace)
            if arm.draft_length:
                self.drafting[arm.drafter].append(pace)
        self.known.add(arm)

    def pace(self, arm: Choice, plain: Choice) -> float | None:
        """The arm's own, else that of arms like it, else of any: so all are compared by price until they are timed.

        None when nothing was timed.
        """
        own = self.paces[arm] if len(self.paces[arm]) >= FEWEST else None
        alike = self.drafting[arm.drafter] if arm != plain else None
        known = own or alike or self.paces[plain] or [pace for own in self.drafting.values() for pace in own]
        return statistics.median(known) if known else None

    def added(self) -> tuple[float, float]:
        """Sum up what copies took and should have taken, without the round that took most: it was disturbed."""
        kept = sorted(self.extra)[: max(1, len(self.extra) - 1)]
        return sum(took for took, _ in kept), sum(should for _, should in kept)

    def forget_drafting(self, plain: Choice) -> None:
        self.extra.clear()
        self.drafting.clear()
        for arm in [arm for arm in self.paces if arm != plain]:
            del self.paces[arm]


class Controller:
    """Choose what a round does, by tokens per measured second. One controller serves all rows of its kind.

    `guard` makes plain steps one more choice, taken while they are faster; without it and with arms a controller
    always drafts: all rows by an exit, or those that can copy beside plain steps of the others. Without arms a row
    that does not copy takes plain steps. One that is not `timed` serves a single row, where it has arms: what it
    learns of their agreement must be that row's.
    """

    def __init__(
        self,
        prices: Prices,
        arms: Sequence[Choice],
        *,
        copying: Copying | None = None,
        trained: bool = False,
        guard: bool = True,
        timed: bool = True,
    ) -> None:
        self.prices, self.arms, self.guard = prices, tuple(arms), guard
        self.copying, self.timed = copying, timed
        self.plain = Choice(prices.layers, 0)
        self.copies = Choice(prices.layers, 1, drafter=LOOKUP)  # of all lengths: they are timed together
        self.exits = tuple(sorted({arm.exit_layer for arm in arms}))
        self.prior = TRAINED if trained else UNTRAINED
        self._firmness = FIRM if trained and self.exits == (0,) else PRIOR
        self._agreement = {exit_layer: _Fading() for exit_layer in self.exits}
        # Tokens of rounds against those expected: drafts are not kept independently of each other.
        self._surplus = _Fading()
        self._books: dict[int, _Book] = defaultdict(_Book)
        self._current: Choice | None = None
        self._since_plain = self._since_probe = self._num_probes = self._rest = self._resting = 0
        self._plain_run, self._patience = 0, PATIENCE

    # -- what is known ---------------------------------------------------------------------------------------

    def agreement(self, exit_layer: int) -> float:
        """Estimate how often the exit agrees with the full model, per token, lately."""
        seen = self._agreement[exit_layer]
        return (seen.total + self._firmness * self.prior) / (seen.weight + self._firmness)

    def tokens_per_s(self, arm: Choice, num_rows: int = 1) -> float:
        """Estimate an arm's tokens per second and row; in layers instead of seconds while nothing was timed."""
        pace = self._books[_bucket(num_rows)].pace(arm, self.plain) or 1.0
        if arm == self.plain:
            return 1.0 / (pace * self.prices.round(arm.exit_layer, 0, num_rows))
        surplus = (self._surplus.total + PRIOR) / (self._surplus.weight + PRIOR)
        return self._tokens_per_price(arm, num_rows) * surplus / pace

    def _tokens_per_price(self, arm: Choice, num_rows: int) -> float:
        expected = expected_tokens(arm.draft_length, self.agreement(arm.exit_layer))
        return expected / self.prices.round(arm.exit_layer, arm.draft_length, num_rows)

    # -- choosing --------------------------------------------------------------------------------------------

    def rest(self, num_rows: int) -> Choice | None:
        """The choice for a round at rest, or None.

        At rest many rows take plain steps that are neither chosen nor learnt from, which saves 3% of a step.
        """
        resting = self.timed and self.guard and num_rows >= MANY and self._resting > 0
        return replace(self.plain, unseen=True) if resting else None

    def _count_rest(self) -> None:
        self._resting = max(0, self._resting - 1)
        self._since_probe += 1
        self._plain_run += 1
        self._surplus.fade(1.0, WINDOW / 4)

    def choose(self, chances: Sequence[Sequence[float]]) -> list[Choice]:
        """Choose for the next round of each row, given the chances of its copied tokens (`History.chances`).

        Changes nothing: `learn` does.
        """
        num_rows = len(chances)
        choice = self.choice(num_rows)
        overdue = choice.probes and self._since_probe >= OVERDUE * self._probe_every(choice, num_rows)
        if self.copying is None or overdue or self._plain_is_due(num_rows):
            return [choice] * num_rows
        lengths, gain = self._copies(chances)
        bar = self.tokens_per_s(replace(choice, probes=()), num_rows) / self.tokens_per_s(
            self.plain, num_rows
        )
        if not any(lengths) or gain <= bar * (MANY_MARGIN if self.timed and num_rows >= MANY else 1.0):
            return [choice] * num_rows
        return [Choice(self.prices.layers, k, drafter=LOOKUP) if k else self.plain for k in lengths]

    def choice(self, num_rows: int = 1) -> Choice:
        """Choose among exits and a plain step, for all rows alike."""
        if not self.arms or self._plain_is_due(num_rows):
            return self.plain
        rates = {arm: self.tokens_per_s(arm, num_rows) for arm in self.arms}
        best = max(self.arms, key=lambda arm: rates[arm] * (MARGIN if arm == self._current else 1.0))
        if self.guard:
            drafting = self._current in self.arms
            bar = self.tokens_per_s(self.plain, num_rows) * (1.0 if drafting else MARGIN)
            if rates[best] < bar:
                due = self._since_probe >= min(4 * self._num_probes, self._probe_every(self.plain, num_rows))
                return replace(self.plain, probes=self.exits) if due else self.plain
        others = tuple(exit_layer for exit_layer in self.exits if exit_layer != best.exit_layer)
        if others and self._since_probe >= max(8, self._probe_every(best, num_rows)):
            return replace(best, probes=others)
        return best

    def _plain_is_due(self, num_rows: int) -> bool:
        """Whether it is time to see how long a plain step takes."""
        if not (self.guard and self.timed):
            return False
        known = len(self._books[_bucket(num_rows)].paces[self.plain]) >= FEWEST
        return self._since_plain >= (PLAIN_EVERY if known else PLAIN_FIRST)

    def _copies(self, chances: Sequence[Sequence[float]]) -> tuple[list[int], float]:
        """Find how many tokens each row should copy, and what that brings over plain steps: tokens per price."""
        assert self.copying is not None
        num_rows = len(chances)
        spent = self._books[_bucket(num_rows)].added()
        return best_lengths(chances, lambda n: self._price(num_rows, n, spent), self.copying.padded)

    def _more(self, num_rows: int, positions: int) -> float:
        """Price positions beside those of a plain step, in such steps."""
        assert self.copying is not None
        return self.copying.costs.more(num_rows, positions)

    def _price(self, num_rows: int, positions: int, spent: tuple[float, float]) -> float:
        """Price them as `_more`, in proportion to what copies have cost lately, see `_Book.added`."""
        more, (took, should) = self._more(num_rows, positions), spent
        prior = PRIOR * more
        return more * max(CHEAPEST, (took + prior) / (should + prior)) if more else 0.0

    def _probe_every(self, arm: Choice, num_rows: int) -> int:
        """Rounds between probes: each reads the draft head once, and sees as many positions as there are rows."""
        price = self.prices.round(arm.exit_layer, arm.draft_length, num_rows)
        return math.ceil(num_rows * self.prices.draft_head / (PROBE_SHARE * price))

    # -- learning --------------------------------------------------------------------------------------------

    def learn(self, choice: Choice, seconds: float, rows: Sequence[Drafted]) -> None:
        """Take in what a round gave and how long it took; of rows that copy, the choice of the longest copy."""
        if choice.unseen:
            self._count_rest()
            return
        arm, book, num_rows = replace(choice, probes=()), self._books[_bucket(len(rows))], len(rows)
        drafted = max(row.drafted for row in rows)
        price = self.prices.round(arm.exit_layer, drafted, num_rows)
        plain = arm == self.plain
        if not plain:
            self._rest = self._resting = 0
        if arm.source == LOOKUP and not plain:
            padded = self.copying is not None and self.copying.padded
            copied = num_rows * drafted if padded else sum(row.drafted for row in rows)
            more, step = self._more(num_rows, copied), book.pace(self.plain, self.plain)
            if self.timed and step is not None and self.copies in book.known:
                book.extra.append((seconds / (step * price) - 1, more))
            arm, price = self.copies, price * (1 + more)
        # Asked before its time is noted, which may make it due more seldom. Drafting goes on after it.
        measured_only = plain and self._plain_is_due(num_rows)
        if self.timed and not choice.probes:  # a probe's time is not the arm's
            book.add(arm, seconds / price)
        if arm.source == LOOKUP and not plain:
            self._since_plain += 1
            self._since_probe += 1
            return
        if plain and not measured_only and num_rows >= MANY:
            self._rest = self._resting = min(max(FIRST_REST, 2 * self._rest + 1), LONGEST_REST)
        if measured_only and book.extra:  # what copies took may have had a reason that is gone
            book.extra.popleft()
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
        # Of drafts that were cut only the likely ones are judged: too high an agreement, which surplus corrects.
        judged = sum(min(row.kept + 1, row.drafted) for row in rows)
        self._agreement[arm.exit_layer].add(sum(row.kept for row in rows), judged, WINDOW)
        if arm.confidence or arm.costs is not None:
            expected = num_rows * price * self._tokens_per_price(arm, num_rows)
        else:  # by what was drafted: a draft may have been cut by the end of the output
            agreement = self.agreement(arm.exit_layer)
            expected = sum(expected_tokens(row.drafted, agreement) for row in rows)
        self._surplus.add(sum(row.committed for row in rows), expected, WINDOW)


def _bucket(num_rows: int) -> int:
    """Numbers of rows that are timed together: powers of two."""
    return 1 << max(0, num_rows - 1).bit_length()
