"""Predictions: rounds and times put together as arithmetic says, whatever the times are."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import tiny
from layerskip.checkpoint.facts import Facts
from layerskip.decode.language_model import LanguageModel
from layerskip.errors import UserError
from layerskip.measure.advice import prediction
from layerskip.measure.advice.cells import Cell
from layerskip.measure.advice.prediction import (
    analyse,
    candidate_exits,
    candidate_sizes,
    default_cell,
    predict_copies,
)
from layerskip.measure.speed import round_times
from layerskip.measure.speed.round_times import RoundTimes
from layerskip.model.cost import RowCosts

PROMPTS = [[5, 6, 7, 8], [9], [3, 1, 4, 1, 5]]
L = tiny.NUM_LAYERS


@pytest.fixture
def lm(monkeypatch):
    monkeypatch.setattr(round_times, "TURNS", 2)
    return LanguageModel(tiny.stack("llama"))


def layers(lengths, exits=(1, 2, 4), turns=3, head=0.0):
    """Times as the cost model in layers would have them: a round is L + K E + K head."""
    rounds = np.array([[L + k * e for k in (0, *lengths)] for e in exits], float)
    return RoundTimes(
        exits, (0, *lengths), np.stack([rounds] * turns), {0: np.zeros(turns), 24: np.full(turns, -head)}
    )


def test_times_between_measured_rounds_are_linear_in_layers_and_drafts():
    times = layers((1, 4, 12), exits=(1, 4), head=0.5).medians()
    for exit_layer in (1, 2, 3, 4):
        assert np.allclose(times.seconds(exit_layer, 0)[0], [L + k * exit_layer for k in range(13)])
        assert np.allclose(times.seconds(exit_layer, 24)[0], [L + k * (exit_layer - 0.5) for k in range(13)])
    assert times.plain == [L]


def test_drawn_turns_keep_what_was_measured_together():
    times = layers((1, 4), turns=4)
    times.rounds[:] *= np.arange(1, 5)[:, None, None]  # the whole machine twice as slow in turn 2, and so on
    drawn = times.resampled(50, np.random.default_rng(0))
    ratio = drawn.seconds(2, 0)[:, 4] / drawn.plain
    assert np.allclose(ratio, (L + 4 * 2) / L)
    assert len(set(drawn.plain.tolist())) > 1


def test_a_speedup_is_plain_seconds_over_the_rounds_seconds(lm, monkeypatch):
    monkeypatch.setattr(prediction, "round_times", lambda *given, **more: layers(prediction.TIMED_LENGTHS))
    analysis = analyse(lm, PROMPTS, 20, exits=[1, 2, 4], draft_vocab="off")
    by_cell = {one.cell: one for one in analysis.cells}
    assert set(by_cell) == {Cell(e, k, 0) for e in (1, 2, 4) for k in prediction.LENGTHS}
    assert [one.speedup for one in analysis.cells] == sorted(
        (o.speedup for o in analysis.cells), reverse=True
    )
    one = by_cell[Cell(2, 3, 0)]
    seconds = []
    for prompt in PROMPTS:
        rounds = [
            r
            for r in lm.stream(prompt, exit_layer=2, draft_length=3, max_new_tokens=20)
            if not r.prompt_tokens
        ]
        seconds.append(sum(L + 2 * r.drafted for r in rounds))
    assert one.speedup == pytest.approx(len(PROMPTS) * 19 * L / sum(seconds))
    ratios = [19 * L / own for own in seconds]
    assert one.interval[0] <= one.speedup <= one.interval[1]
    assert min(ratios) - 1e-9 <= one.interval[0]
    assert one.interval[1] <= max(ratios) + 1e-9
    assert one.round_s == pytest.approx(L + 2 * one.rounds.drafted.mean())


def test_the_confidence_policy_is_predicted_at_least_as_well_as_its_own_exit_can(lm, monkeypatch):
    monkeypatch.setattr(prediction, "round_times", lambda *given, **more: layers(prediction.TIMED_LENGTHS))
    analysis = analyse(lm, PROMPTS, 20, exits=[2, 4], draft_vocab="off")
    assert analysis.confident.confidence in prediction.THRESHOLDS
    assert analysis.confident.rounds.tokens.sum() == 3 * 19
    assert analyse(lm, PROMPTS, 20, exits=[2], draft_vocab="off", batch_size=2).confident is None


REPEATING = [[7, 7, 7], [5, 9, 20, 33, 5, 9, 20], [9]]
CHEAP = RowCosts(((1, 1.0), (64, 1.63)))  # a hundredth of a pass for every position more


@pytest.mark.parametrize("batch_size", [1, 3])
def test_copies_are_predicted_from_their_rounds_and_what_several_positions_cost(lm, monkeypatch, batch_size):
    monkeypatch.setattr(prediction, "round_times", lambda *given, **more: layers(prediction.TIMED_LENGTHS))
    monkeypatch.setattr(lm, "row_costs", lambda measured=True: CHEAP)
    lm.facts = Facts(exits=(1, 2), exit_layer=1, draft_length=4, match_min=2)
    analysis = analyse(lm, REPEATING, 20, exits=[1, 2], draft_vocab="off", batch_size=batch_size)
    assert (
        [one.cell for one in analysis.copies]
        == [
            Cell(match_min=2, copy_length=16),
            replace(analysis.best.cell, match_min=2, copy_length=16),
            Cell(1, 4, 0, 2, 16),  # the default
        ][: 2 if analysis.best.cell == Cell(1, 4, 0) else 3]
    )
    for one in analysis.copies:
        rounds, cell = one.rounds, one.cell
        copies = L * (1 + 0.01 * (batch_size * (1 + rounds.drafted) - 1)) / CHEAP(batch_size)
        seconds = np.where(rounds.copied, copies, L + cell.exit_layer * rounds.drafted).sum()
        assert rounds.tokens.sum() == len(REPEATING) * 19
        assert one.speedup == pytest.approx(len(REPEATING) * 19 * L / seconds)
        assert one.round_s == pytest.approx(seconds / len(rounds.drafted))
        assert one.interval[0] <= one.speedup <= one.interval[1]
    alone, both = (one.rounds.by_source for one in analysis.copies[:2])
    assert alone["lookup"]["accepted"] > 0
    assert set(alone) == {"lookup"}
    assert both["exit"]["accepted"] > 0
    assert analysis.copies[0].rounds.plain_share > 0
    assert not lm.controllers, "what a prediction has learnt is not kept"


def test_tune_predicts_copies_of_every_kind_once(lm, monkeypatch):
    monkeypatch.setattr(prediction, "round_times", lambda *given, **more: layers(prediction.TIMED_LENGTHS))
    analysis = analyse(lm, REPEATING, 20, exits=[1, 2], draft_vocab="off")
    for _ in range(2):
        predict_copies(lm, analysis)
        cells = [one.cell for one in analysis.copies]
        assert len(cells) == len(set(cells)) == 3 * len(prediction.MATCHES) * len(prediction.COPY_LENGTHS)
    assert {cell.exit_layer for cell in cells} == {0, 1, 2}
    leading = {one.cell for one in analysis.best_of(lambda cell: cell.exit_layer)}
    assert {replace(cell, match_min=0, copy_length=0) for cell in cells} == {Cell(), *leading}
    for name, one in analysis.sources.items():
        same = [other for other in [*analysis.copies, *analysis.cells] if other.cell.drafter == name]
        assert one.speedup == max(other.speedup for other in same)


def test_rounds_are_measured_from_one_context_and_in_turns(lm):
    lm.stack.counters.reset()
    times = round_times.round_times(lm, [5, 6, 7], [1, 4], [1, 3], [0, 24], turns=2)
    assert times.rounds.shape == (2, 2, 3)
    assert set(times.per_draft) == {0, 24}
    assert (times.per_draft[24] == 0).all(), "the middle vocabulary is the reference"
    assert (times.per_draft[0] >= 0).all(), "a larger head is never cheaper"
    turns = 2 + round_times.WARM_UP
    runs = lm.stack.counters.runs
    assert runs[0, 1, 1] == turns * (2 + 4), "K + 1 early passes, for K = 1 and 3"
    assert runs[1, L, 2] == runs[1, L, 4] == runs[4, L, 2] == turns
    assert runs[4, L, 4] == 2 * turns, "the cell that every vocabulary is timed in"
    assert runs[0, L, 3] == 2, "each engine computes the context once"


def test_a_long_context_is_computed_before_anything_is_timed(lm, monkeypatch):
    monkeypatch.setattr(round_times, "Engine", functools.partial(round_times.Engine, prefill_chunk=2))
    monkeypatch.setattr(round_times, "WARM_UP", 0)
    steps, timer = [], round_times.time.perf_counter
    step = round_times.Engine.func.step
    monkeypatch.setattr(round_times.Engine.func, "step", lambda own: steps.append(step(own)) or steps[-1])
    timed = SimpleNamespace(perf_counter=lambda: steps.append("clock") or timer())
    monkeypatch.setattr(round_times, "time", timed)
    round_times.round_times(lm, [5, 6, 7, 8, 9], [2], [2], [0], batch_size=2, turns=1)
    clocks = [i for i, one in enumerate(steps) if one == "clock"]
    between = [steps[a + 1 : b] for a, b in zip(clocks[::2], clocks[1::2], strict=True)]
    assert all(len(one) == 1 and {r.source for r in one[0]} <= {"plain", "exit"} for one in between)
    assert [len(one[0]) for one in between] == [2, 2], "rounds of both rows"
    assert sum(r.source == "prefill" for one in steps[: clocks[0]] for r in one) >= 6


def test_rounds_of_several_rows_are_rounds_of_all_of_them(lm):
    lm.stack.counters.reset()
    times = round_times.round_times(lm, [5, 6, 7], [2], [2], [0], batch_size=3, turns=1)
    assert (times.rounds > 0).all()
    assert times.rounds.shape == (1, 1, 2)


def test_candidates_are_the_trained_exits_else_a_spread(lm):
    assert candidate_exits(lm) == [1, 2, 3, 4]
    lm.facts = Facts(exits=(4, 2))
    assert candidate_exits(lm) == [2, 4]
    assert prediction.spread(range(1, 30), 8) == [1, 5, 9, 13, 17, 21, 25, 29]


def test_candidate_vocabularies_end_where_the_ranked_list_does(lm, monkeypatch):
    assert candidate_sizes(lm) == [0], "the model has 64 tokens"
    monkeypatch.setattr(prediction, "DRAFT_VOCABULARIES", (8, 16, 32, 64))
    assert candidate_sizes(lm) == [0, 8, 16, 32]
    lm.facts = Facts(draft_vocab_size=12)
    assert candidate_sizes(lm) == [0, 8, 12, 16, 32], "the default, of no list"
    lm.facts, lm.ranked_vocabulary = Facts(), list(range(20, 40))
    assert candidate_sizes(lm) == [0, 8, 16, 20]
    lm.facts = Facts(draft_vocab_size=12)
    assert candidate_sizes(lm) == [0, 8, 12, 16, 20]
    assert candidate_sizes(lm, "off") == [0]
    assert candidate_sizes(lm, 24) == [24]
    with pytest.raises(UserError, match="draft vocabulary"):
        candidate_sizes(lm, 65)


def test_the_default_cell_is_what_the_checkpoint_drafts_with(lm):
    assert default_cell(lm) == Cell(match_min=1, copy_length=16), "copies need no training"
    lm.facts = Facts(exits=(2,), exit_layer=2, draft_length=3)
    assert default_cell(lm) == Cell(2, 3, 0, 1, 16)
    lm.facts = Facts(exits=(2,), exit_layer=2, draft_length=3, drafter="exit")
    assert default_cell(lm) == Cell(2, 3, 0)
    lm.facts = Facts(exits=(2,), drafter="off")
    assert default_cell(lm) is None


def test_outputs_that_end_at_once_leave_nothing_to_predict(lm):
    first = lm.generate(PROMPTS[0], max_new_tokens=1, mode="ar").tokens
    lm.generation_config = type("Config", (), {"eos_token_id": first})
    with pytest.raises(UserError, match="nothing to draft"):
        analyse(lm, PROMPTS[:1], 8)


def test_a_record_is_plain_numbers(lm):
    import json

    record = analyse(lm, PROMPTS, 12, exits=[2, 4], draft_vocab=24).record()
    assert json.loads(json.dumps(record)) == record
    assert list(record["agreement"]) == ["1", "2", "3", "4", "5"]
    assert record["agreement"]["5"] == 1
    assert record["best"]["draft_vocab"] == 24
    assert len(record["surface"]) == 2 * len(prediction.LENGTHS)
    assert [len(places) for places in record["acceptance_by_position"].values()] == [12, 12]
