"""What every exit, draft length and draft vocabulary would gain here, predicted from one pass and measured times.

    analysis = analyse(lm, prompts, max_new_tokens=64)
    analysis.best               # the cell with the largest predicted speed-up
    analysis.record()           # what `layerskip doctor --json` and `tune --json` have in common

Plain decoding continues the prompts; one pass over those continuations says where each exit names the next
token; `replay` turns that into rounds, `round_times` prices them. A cell's speed-up is plain seconds over its
own, both for all prompts; its interval comes from drawing prompts and turns of the timing with replacement.
That the best of hundreds of cells was picked by the same numbers is not corrected for: it is the interval of
any one cell.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from layerskip.decode.options import Options
from layerskip.errors import UserError
from layerskip.measure.exits.continuations import Continuation, Seen, continuations, observed
from layerskip.measure.exits.replay import Replayed, by_place, joined, replay
from layerskip.measure.speed.round_times import Medians, RoundTimes, round_times
from layerskip.model.head import DRAFT_VOCABULARIES
from layerskip.watch import Watch, silent

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12)  # K that are tried
TIMED_LENGTHS = (1, 2, 4, 8, 12)
SPREAD = 8  # exits that are tried where none is trained
TIMED_EXITS = 4
CURVE = 32  # exits whose agreement is told
DRAWS = 400
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Cell:
    """A setting of self-speculation. `draft_vocab` 0 is the whole head."""

    exit_layer: int
    draft_length: int
    draft_vocab: int

    @property
    def options(self) -> dict[str, Any]:
        return {
            "mode": "self-speculative",
            "exit_layer": self.exit_layer,
            "draft_length": self.draft_length,
            "draft_vocab": self.draft_vocab or "off",
            "policy": "fixed",
        }

    def record(self) -> dict[str, Any]:
        names = {"exit_layer": self.exit_layer, "draft_length": self.draft_length}
        return {**names, "draft_vocab": self.draft_vocab or "off"}


@dataclass(frozen=True)
class Predicted:
    """What a cell would gain, and from which rounds."""

    cell: Cell
    speedup: float
    interval: tuple[float, float]
    rounds: Replayed
    round_s: float  # mean
    confidence: float | None = None  # threshold of the confidence policy

    def record(self) -> dict[str, Any]:
        return {
            **self.cell.record(),
            "predicted_speedup": self.speedup,
            "interval": list(self.interval),
            "tokens_per_round": self.rounds.tokens_per_round,
            "acceptance": self.rounds.acceptance,
            "round_s": self.round_s,
        }


@dataclass
class Analysis:
    """All predictions for a model on some prompts. `cells` come by falling speed-up."""

    continuations: list[Continuation]
    budget: int
    seen: Seen
    times: RoundTimes
    cells: list[Predicted] = field(default_factory=list)
    confident: Predicted | None = None  # the best cell of the confidence policy

    @property
    def best(self) -> Predicted:
        """The cell with the largest predicted speed-up, below 1 where no setting pays."""
        return self.cells[0]

    def best_of(self, key: Callable[[Cell], Any]) -> list[Predicted]:
        """Take the best cell of each kind, by falling speed-up."""
        found: dict[Any, Predicted] = {}
        for one in self.cells:
            found.setdefault(key(one.cell), one)
        return list(found.values())

    def record(self) -> dict[str, Any]:
        """Say it all in plain numbers. The surface holds every (E, K) with its best draft vocabulary."""
        best, medians = self.best, self.times.medians()
        surface = self.best_of(lambda cell: (cell.exit_layer, cell.draft_length))
        longest = max(one.cell.draft_length for one in self.cells)
        places = {}
        for exit_layer in sorted({one.cell.exit_layer for one in self.cells}):
            played = joined(_replayed(self, Cell(exit_layer, longest, best.cell.draft_vocab)))
            places[str(exit_layer)] = by_place(played.drafted, played.accepted, longest)
        by_size = self.best_of(lambda cell: cell.draft_vocab)
        seconds = medians.seconds(best.cell.exit_layer, best.cell.draft_vocab)[0]
        return {
            "agreement": {str(k): value for k, value in sorted(self.seen.agreement.items())},
            "step_s": {
                "plain": float(medians.plain[0]),
                "round": float(seconds[best.cell.draft_length]),
                "rounds": [
                    {"exit_layer": e, "draft_length": k, "seconds": float(medians.rounds[0, x, y])}
                    for x, e in enumerate(self.times.exits)
                    for y, k in enumerate(self.times.lengths)
                    if k
                ],
            },
            "best": {
                **best.cell.record(),
                "predicted_speedup": best.speedup,
                "interval": list(best.interval),
                "tokens_per_round": best.rounds.tokens_per_round,
                "acceptance": best.rounds.acceptance,
            },
            "confidence_policy": self.confident
            and {**self.confident.record(), "confidence": self.confident.confidence},
            "surface": sorted(
                (one.record() for one in surface), key=lambda row: (row["exit_layer"], row["draft_length"])
            ),
            "draft_vocabularies": {
                str(one.cell.draft_vocab or "off"): one.speedup
                for one in sorted(by_size, key=lambda one: one.cell.draft_vocab)
            },
            "acceptance_by_position": places,
            "tokens": sum(len(one.tokens) for one in self.continuations),
        }


def analyse(
    lm: LanguageModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    exits: Sequence[int] | None = None,
    draft_vocab: int | str = "auto",
    batch_size: int = 1,
    watch: Watch = silent,
) -> Analysis:
    """Predict every cell. `batch_size` is how many rows the rounds are timed with.

    Raises: UserError for a model of one layer, prompts that leave nothing to predict, an exit out of range.
    """
    if lm.stack.num_layers < 2:
        raise UserError("the model has one layer", "self-speculation needs a layer above the exit")
    exits = sorted(set(exits)) if exits else candidate_exits(lm)
    for exit_layer in exits:
        lm.plan(Options(mode="self-speculative", exit_layer=exit_layer))  # refuses one out of range
    sizes = candidate_sizes(lm, draft_vocab)
    found = continuations(lm, prompts, max_new_tokens, watch)
    if not any(len(one.tokens) > 1 for one in found):
        raise UserError(
            "every continuation ends at its first token, so there is nothing to draft",
            "give other prompts, or a larger --max-new-tokens",
        )
    curve = spread(range(1, lm.stack.num_layers + 1), CURVE)
    seen = observed(lm, found, exits, sizes, curve, watch)
    timed = spread(exits, TIMED_EXITS)
    times = round_times(lm, _context(found), timed, TIMED_LENGTHS, sizes, batch_size, watch=watch)
    analysis = Analysis(found, max_new_tokens, seen, times)
    prices = _Prices(analysis)
    made = [prices.predicted(Cell(e, k, v)) for e in exits for k in LENGTHS for v in sizes]
    analysis.cells = sorted(made, key=lambda one: -one.speedup)
    if batch_size == 1 and lm.stack.device.type != "cuda":  # there a draft is computed in full
        analysis.confident = _confident(analysis, prices)
    return analysis


def candidate_exits(lm: LanguageModel) -> list[int]:
    """The trained exits; without any a spread over the layers."""
    return sorted(lm.facts.exits) or spread(range(1, lm.stack.num_layers), SPREAD)


def spread(of: Sequence[int], count: int) -> list[int]:
    """Choose up to `count` of them at equal distances, the ends among them."""
    return [of[int(place)] for place in np.linspace(0, len(of) - 1, min(count, len(of))).round()]


def candidate_sizes(lm: LanguageModel, wanted: int | str = "auto") -> list[int]:
    """Draft vocabularies worth trying; 0 is the whole head.

    A checkpoint's ranked list ends somewhere: what stands behind its end was not worth a place. What drafting uses
    by default is tried too.
    """
    if wanted == "off":
        return [0]
    if wanted != "auto":
        lm.draft_head(Options.parse({"draft_vocab": wanted}))  # refuses a size out of range
        return [int(wanted)]
    full, ranked = lm.stack.vocab_size, lm.ranked_vocabulary
    last = full if ranked is None else len(set(ranked))
    own = {last, min(last, lm.facts.draft_vocab_size or 0)}
    return sorted({0, *own, *(size for size in DRAFT_VOCABULARIES if size <= last)} - {full})


def default_cell(lm: LanguageModel) -> Cell | None:
    """What the checkpoint says to draft with; None where it says to decode plainly."""
    plan = lm.plan(Options())
    if not plan.draft_length:
        return None
    head = lm.draft_head(Options())
    return Cell(plan.exit_layer, plan.draft_length, 0 if head is None else head.size)


def _context(found: Sequence[Continuation]) -> list[int]:
    """A typical row in the middle of its continuation."""
    lengths = [len(one.prompt) + len(one.tokens) // 2 for one in found]
    chosen = found[lengths.index(statistics.median_low(lengths))]
    return [*chosen.prompt, *chosen.tokens[: len(chosen.tokens) // 2]]


# -- from rounds and times to speed-ups ----------------------------------------------------------------------


def _replayed(analysis: Analysis, cell: Cell, threshold: float | None = None) -> list[Replayed]:
    """The rounds of each continuation that has any."""
    key = (cell.exit_layer, cell.draft_vocab)
    return [
        replay(
            bits, cell.draft_length, analysis.budget - 1, None if threshold is None else sure, threshold or 0
        )
        for bits, sure in zip(analysis.seen.bits[key], analysis.seen.confidence[key], strict=True)
        if len(bits)
    ]


class _Prices:
    """Turn rounds into speed-ups, with one set of bootstrap draws for all cells: differences are then paired."""

    def __init__(self, analysis: Analysis, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.analysis = analysis
        self.middle, self.drawn = analysis.times.medians(), analysis.times.resampled(DRAWS, rng)
        prompts = sum(len(one.tokens) > 1 for one in analysis.continuations)
        self.chosen = rng.integers(prompts, size=(DRAWS, prompts))

    def predicted(self, cell: Cell, threshold: float | None = None) -> Predicted:
        rounds = _replayed(self.analysis, cell, threshold)
        drawn = (np.take_along_axis(x, self.chosen, axis=1) for x in _seconds(rounds, cell, self.drawn))
        low, high = np.percentile(_ratio(*drawn), [2.5, 97.5])
        seconds = self.middle.seconds(cell.exit_layer, cell.draft_vocab)[0]
        together = joined(rounds)
        return Predicted(
            cell,
            float(_ratio(*_seconds(rounds, cell, self.middle))[0]),
            (float(low), float(high)),
            together,
            float(seconds[together.drafted].mean()),
            threshold,
        )


def _ratio(plain: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Divide sums over prompts, [draws, P] each: [draws]. Of single outputs the ratios are lumpy, in few rounds."""
    made: np.ndarray = plain.sum(1) / own.sum(1)
    return made


def _seconds(rounds: Sequence[Replayed], cell: Cell, times: Medians) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of plain decoding and of a cell, of every prompt: [draws, P] each."""
    seconds = times.seconds(cell.exit_layer, cell.draft_vocab)  # [draws, longest + 1]
    counts = np.stack([np.bincount(one.drafted, minlength=seconds.shape[1]) for one in rounds])
    looked = np.array([one.looked.sum() for one in rounds])  # [P]
    tokens = np.array([one.tokens.sum() for one in rounds])  # [P]
    # A look at the exit that draws nothing was not timed; what a first draft adds to a round bounds it.
    look = np.clip(seconds[:, 1] - seconds[:, 0], 0, None)
    return tokens * times.plain[:, None], seconds @ counts.T + np.outer(look, looked)


def _confident(analysis: Analysis, prices: _Prices) -> Predicted:
    """The best threshold and K of the confidence policy, at the exits and vocabularies of the best cells."""
    kinds = analysis.best_of(lambda cell: (cell.exit_layer, cell.draft_vocab))[:4]
    cells = [Cell(k.cell.exit_layer, n, k.cell.draft_vocab) for k in kinds for n in LENGTHS]
    made = [prices.predicted(cell, threshold) for cell in cells for threshold in THRESHOLDS]
    return max(made, key=lambda one: one.speedup)
