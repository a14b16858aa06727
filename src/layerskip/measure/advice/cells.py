"""A setting of self-speculation, what it is predicted to gain, and all predictions for a model on some prompts.

analysis.best               # the exit, draft length and draft vocabulary with the largest predicted speed-up
analysis.sources            # lookup alone, the exit alone, both
analysis.recommended        # the source to draft from; None where none gains
analysis.record()           # what `layerskip doctor --json` and `tune --json` have in common
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from layerskip.decode.control import LOOKUP
from layerskip.measure.exits.replay import Replayed, by_place, joined, replay

if TYPE_CHECKING:
    from layerskip.measure.exits.continuations import Continuation, Seen
    from layerskip.measure.speed.round_times import RoundTimes
    from layerskip.model.cost import RowCosts

SOURCES = (LOOKUP, "exit", "auto")  # the simpler one first
LEAST_GAIN = 1.03  # over plain decoding, and over a simpler source, to be recommended


@dataclass(frozen=True)
class Cell:
    """A setting of self-speculation: an exit, copies from the text so far, or both.

    No exit drafts where `draft_length` is 0, no row copies where `copy_length` is 0; `draft_vocab` 0 is the whole
    head.
    """

    exit_layer: int = 0
    draft_length: int = 0
    draft_vocab: int = 0
    match_min: int = 0
    copy_length: int = 0

    @property
    def drafter(self) -> str:
        """Who drafts: exit, lookup or auto (both)."""
        return "exit" if not self.copy_length else "auto" if self.draft_length else LOOKUP

    @property
    def options(self) -> dict[str, Any]:
        """What decodes by it; copies go by the clock, as they do by default."""
        made = {"mode": "self-speculative", "drafter": self.drafter, "policy": "fixed"}
        clock = {"guard": True} if self.copy_length else {}
        return {**made, **self._given(), **clock, "draft_vocab": self.draft_vocab or "off"}

    def _given(self) -> dict[str, int]:
        exit = ("exit_layer", "draft_length") if self.draft_length else ()
        copies = ("match_min", "copy_length") if self.copy_length else ()
        return {name: getattr(self, name) for name in (*exit, *copies)}

    def record(self) -> dict[str, Any]:
        vocab = (self.draft_vocab or "off") if self.draft_length else None
        unused = dict.fromkeys(("exit_layer", "draft_length", "match_min", "copy_length"))
        return {"drafter": self.drafter, **unused, **self._given(), "draft_vocab": vocab}

    def __str__(self) -> str:
        return worded(self.record())


def worded(setting: Mapping[str, Any]) -> str:
    """Word a setting's record for a sentence or a table."""
    names = {"E": "exit_layer", "K": "draft_length", "vocabulary": "draft_vocab"}
    names |= {"match": "match_min", "copy": "copy_length"}
    given = (f"{word} {setting[name]}" for word, name in names.items() if setting[name] is not None)
    return ", ".join([setting["drafter"], *given])


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

    def source_record(self) -> dict[str, Any]:
        """Say beside it how many rounds drafted nothing, and who drafted in the others."""
        return {**self.record(), "plain_share": self.rounds.plain_share, "by_source": self.rounds.by_source}


@dataclass
class Analysis:
    """All predictions for a model on some prompts. `cells`, those of exits alone, come by falling speed-up."""

    continuations: list[Continuation]
    budget: int
    seen: Seen
    times: RoundTimes
    costs: RowCosts  # of several positions in a pass
    num_rows: int = 1  # that rounds were timed with
    cells: list[Predicted] = field(default_factory=list)
    confident: Predicted | None = None  # the best cell of the confidence policy
    copies: list[Predicted] = field(default_factory=list)  # settings that copy, alone and beside an exit

    @property
    def best(self) -> Predicted:
        """The cell with the largest predicted speed-up, below 1 where no setting pays."""
        return self.cells[0]

    @property
    def sources(self) -> dict[str, Predicted]:
        """The best setting of each source of drafts."""
        ordered = sorted([*self.copies, self.best], key=lambda one: -one.speedup)
        return {name: next(one for one in ordered if one.cell.drafter == name) for name in SOURCES}

    @property
    def recommended(self) -> Predicted | None:
        """The simplest source that gains 3% and that no other is 3% faster than; None where none gains that."""
        found = self.sources.values()
        least = max(LEAST_GAIN, max(one.speedup for one in found) / LEAST_GAIN)
        return next((one for one in found if one.speedup >= least), None)

    def of(self, cell: Cell | None) -> Predicted | None:
        """Look up what was predicted of a setting."""
        return next((one for one in [*self.cells, *self.copies] if one.cell == cell), None)

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
            played = joined(exit_rounds(self, Cell(exit_layer, longest, best.cell.draft_vocab)))
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
            "sources": {name: one.source_record() for name, one in self.sources.items()},
            "recommended_drafter": "off" if self.recommended is None else self.recommended.cell.drafter,
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


def exit_rounds(analysis: Analysis, cell: Cell, threshold: float | None = None) -> list[Replayed]:
    """The rounds of each continuation that has any, of an exit alone."""
    key = (cell.exit_layer, cell.draft_vocab)
    return [
        replay(
            bits, cell.draft_length, analysis.budget - 1, None if threshold is None else sure, threshold or 0
        )
        for bits, sure in zip(analysis.seen.bits[key], analysis.seen.confidence[key], strict=True)
        if bits.shape[-1]
    ]
