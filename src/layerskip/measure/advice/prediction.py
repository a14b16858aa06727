"""What every source of drafts would gain here, with which settings, predicted from one pass and measured times.

    analysis = analyse(lm, prompts, max_new_tokens=64)
    predict_copies(lm, analysis)        # more settings that copy, for tune

Plain decoding continues the prompts; one pass over those continuations says where each exit names the next
token; `replay` turns that into rounds, `replay_sources` where copies draft too; `round_times` prices them. That the
best of hundreds of cells was picked by the same numbers is not corrected for: its interval is that of any one cell.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from layerskip.decode.control import LOOKUP
from layerskip.decode.options import Options
from layerskip.errors import UserError
from layerskip.measure.advice.cells import Analysis, Cell, Predicted
from layerskip.measure.advice.pricing import Prices
from layerskip.measure.exits.continuations import Continuation, continuations, observed
from layerskip.measure.speed.round_times import round_times
from layerskip.model.head import DRAFT_VOCABULARIES
from layerskip.watch import Watch, silent

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12)  # K that are tried
TIMED_LENGTHS = (1, 2, 4, 8, 12)
SPREAD = 8  # exits that are tried where none is trained
TIMED_EXITS = 4
CURVE = 32  # exits whose agreement is told
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MATCHES = (1, 2, 3)  # the shortest match that is copied behind
COPY_LENGTHS = (4, 8, 16, 24)
EXITS_BESIDE = 3  # exits that are tried beside copies


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
    analysis = Analysis(found, max_new_tokens, seen, times, lm.row_costs(), batch_size)
    prices = Prices(lm, analysis)
    made = [prices.predicted(Cell(e, k, v)) for e in exits for k in LENGTHS for v in sizes]
    analysis.cells = sorted(made, key=lambda one: -one.speedup)
    if batch_size == 1 and lm.stack.device.type != "cuda":  # there a draft is computed in full
        analysis.confident = _confident(analysis, prices)
    copying, default = lm.plan(Options(mode="self-speculative", drafter=LOOKUP)).copying, default_cell(lm)
    assert copying is not None
    alone = Cell(match_min=copying.shortest, copy_length=copying.longest)
    beside = replace(analysis.best.cell, match_min=alone.match_min, copy_length=alone.copy_length)
    present = [default] if default and default.copy_length and _seen(analysis, default) else []
    analysis.copies = [prices.predicted(cell) for cell in dict.fromkeys([alone, beside, *present])]
    return analysis


def predict_copies(lm: LanguageModel, analysis: Analysis, watch: Watch = silent) -> None:
    """Add predictions of more settings that copy: each alone, and beside the best cell of the leading exits."""
    prices, known = Prices(lm, analysis), {one.cell for one in analysis.copies}
    leading = analysis.best_of(lambda cell: cell.exit_layer)[:EXITS_BESIDE]
    beside = [Cell(), *(one.cell for one in leading)]
    cells = [replace(c, match_min=m, copy_length=n) for c in beside for m in MATCHES for n in COPY_LENGTHS]
    for done, cell in enumerate(cells):
        watch("replaying copies", done, len(cells))
        if cell not in known:
            analysis.copies.append(prices.predicted(cell))


def _seen(analysis: Analysis, cell: Cell) -> bool:
    """Whether a setting's exit, if it has one, was read and timed."""
    read = (cell.exit_layer, cell.draft_vocab) in analysis.seen.bits
    return not cell.draft_length or (read and cell.draft_length <= max(LENGTHS))


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
    copying = (plan.copying.shortest, plan.copying.longest) if plan.copying else (0, 0)
    if not plan.draft_length:
        return Cell(0, 0, 0, *copying) if plan.copying else None
    head = lm.draft_head(Options())
    return Cell(plan.exit_layer, plan.draft_length, 0 if head is None else head.size, *copying)


def _context(found: Sequence[Continuation]) -> list[int]:
    """A typical row in the middle of its continuation."""
    lengths = [len(one.prompt) + len(one.tokens) // 2 for one in found]
    chosen = found[lengths.index(statistics.median_low(lengths))]
    return [*chosen.prompt, *chosen.tokens[: len(chosen.tokens) // 2]]


def _confident(analysis: Analysis, prices: Prices) -> Predicted:
    """The best threshold and K of the confidence policy, at the exits and vocabularies of the best cells."""
    kinds = analysis.best_of(lambda cell: (cell.exit_layer, cell.draft_vocab))[:4]
    cells = [Cell(k.cell.exit_layer, n, k.cell.draft_vocab) for k in kinds for n in LENGTHS]
    made = [prices.predicted(cell, threshold) for cell in cells for threshold in THRESHOLDS]
    return max(made, key=lambda one: one.speedup)
