"""From rounds and measured times to speed-ups.

    prices = Prices(lm, analysis)
    prices.predicted(Cell(exit_layer=4, draft_length=4))
    prices.predicted(Cell(match_min=1, copy_length=16))

A speed-up is plain seconds over a setting's own, both for all prompts; its interval comes from drawing prompts and
turns of the timing with replacement.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from layerskip.decode.control import LOOKUP
from layerskip.decode.options import Options
from layerskip.measure.advice.cells import Predicted, exit_rounds
from layerskip.measure.exits.replay import Replayed, joined
from layerskip.measure.exits.sources import Said, replay_sources

if TYPE_CHECKING:
    from layerskip.decode.control import Choice
    from layerskip.decode.language_model import LanguageModel
    from layerskip.measure.advice.cells import Analysis, Cell
    from layerskip.measure.speed.round_times import Medians

DRAWS = 400


class Prices:
    """Turn rounds into speed-ups, with one set of bootstrap draws for all cells: differences are then paired."""

    def __init__(self, lm: LanguageModel, analysis: Analysis, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.lm, self.analysis = lm, analysis
        self.middle, self.drawn = analysis.times.medians(), analysis.times.resampled(DRAWS, rng)
        prompts = sum(len(one.tokens) > 1 for one in analysis.continuations)
        self.chosen = rng.integers(prompts, size=(DRAWS, prompts))

    def predicted(self, cell: Cell, threshold: float | None = None) -> Predicted:
        rounds = self._chosen(cell) if cell.copy_length else exit_rounds(self.analysis, cell, threshold)
        drawn = (np.take_along_axis(x, self.chosen, axis=1) for x in self._seconds(rounds, cell, self.drawn))
        low, high = np.percentile(_ratio(*drawn), [2.5, 97.5])
        together, middle = joined(rounds), self._tables(cell, self.middle)
        exits, copies = (table[0][np.minimum(together.drafted, len(table[0]) - 1)] for table in middle)
        return Predicted(
            cell,
            float(_ratio(*self._seconds(rounds, cell, self.middle))[0]),
            (float(low), float(high)),
            together,
            float(np.where(together.copied, copies, exits).mean()),
            threshold,
        )

    def _chosen(self, cell: Cell) -> list[Replayed]:
        """The rounds of each continuation that has any: who drafts is chosen by the times that were measured."""
        analysis, face = self.analysis, copy.copy(self.lm)
        face.controllers = {}  # what is learnt from a prediction is not the model's
        call = face.call(Options.parse(cell.options))
        assert call.controller is not None
        exits, copies = (table[0] for table in self._tables(cell, self.middle))

        def seconds(choice: Choice, drafted: int) -> float:
            return float((copies if choice.source == LOOKUP else exits)[drafted])

        made = []
        for i, found in enumerate(analysis.continuations):
            key, said = (cell.exit_layer, cell.draft_vocab), {}
            if cell.draft_length:
                said[cell.exit_layer] = Said(analysis.seen.bits[key][i], analysis.seen.confidence[key][i])
            if len(found.tokens) > 1:
                given = (call.controller(), said, seconds, analysis.budget, call.eos, analysis.num_rows)
                made.append(replay_sources(found, *given))
        return made

    def _tables(self, cell: Cell, times: Medians) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of rounds with 0, 1, 2 ... drafts of the cell's exit, and of copies: [draws, most + 1] each."""
        plain, rows = times.plain[:, None], self.analysis.num_rows
        exits = times.seconds(cell.exit_layer, cell.draft_vocab) if cell.draft_length else plain
        passes = [self.analysis.costs(rows * (1 + n)) for n in range(cell.copy_length + 1)]
        return exits, plain * np.array(passes) / self.analysis.costs(rows)

    def _seconds(
        self, rounds: Sequence[Replayed], cell: Cell, times: Medians
    ) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of plain decoding and of a cell, of every prompt: [draws, P] each."""
        tables = self._tables(cell, times)
        own = np.zeros((len(times.plain), len(rounds)))
        for copied, table in enumerate(tables):
            kind = (one.drafted[one.copied == copied] for one in rounds)
            own += table @ np.stack([np.bincount(x, minlength=table.shape[1]) for x in kind]).T
        if cell.draft_length:  # a look that draws nothing was not timed; what a first draft adds bounds it
            look = np.clip(tables[0][:, 1] - tables[0][:, 0], 0, None)
            own += np.outer(look, [one.looked.sum() for one in rounds])
        tokens = np.array([one.tokens.sum() for one in rounds])  # [P]
        return tokens * times.plain[:, None], own


def _ratio(plain: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Divide sums over prompts, [draws, P] each: [draws]. Of single outputs the ratios are lumpy, in few rounds."""
    made: np.ndarray = plain.sum(1) / own.sum(1)
    return made
