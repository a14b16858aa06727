"""Tuning: who races, that the faster half goes on, and what is written for the winner."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import layerskip
import tiny
from layerskip.decode.language_model import LanguageModel
from layerskip.decode.options import Options
from layerskip.errors import UserError
from layerskip.measure.advice import prediction, tune
from layerskip.measure.advice.cells import Analysis, Cell, Predicted
from layerskip.measure.advice.prediction import candidate_sizes
from layerskip.measure.advice.tune import Race, Trial, finalists, halving, save_choice
from layerskip.measure.exits.replay import replay

PROMPTS = [[5, 6, 7, 8], [9], [3, 1, 4, 1, 5]]


class Surface:
    """An analysis as far as the race looks at it."""

    confident, best, best_of, of = None, Analysis.best, Analysis.best_of, Analysis.of

    def __init__(self, speedups, copies=()):
        rounds = replay(np.ones(4, bool), 2)
        made = [Predicted(Cell(*cell), s, (s, s), rounds, 1.0) for cell, s in speedups.items()]
        self.cells = sorted(made, key=lambda one: -one.speedup)
        self.copies = [Predicted(Cell(*cell), s, (s, s), rounds, 1.0) for cell, s in copies]


@pytest.fixture
def lm():
    return LanguageModel(tiny.stack("llama"))


@pytest.fixture
def scripted(monkeypatch):
    """Runs whose speed is a matter of the exit layer: the others of a race cannot be told apart by luck."""

    def decoded(self, trial, prompts, budget):
        speed = 1.0 if trial is None else 1.0 + 0.1 * trial.cell.exit_layer
        return tune._Run([[1] * 4] * len(prompts), speed, 4, 2)

    monkeypatch.setattr(Race, "_decoded", decoded)


class Predictions:
    def record(self):
        return {"best": "as predicted"}


class Clock:
    """A second passes with every look."""

    now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def trials(*exits):
    return [Trial(Cell(e, 2, 0), 1.0) for e in exits]


def test_finalists_are_the_best_of_each_leading_exit_then_the_best_of_the_rest():
    speedups = {(e, k, v): e + k / 10 - v / 1000 for e in (1, 2, 3, 4) for k in (1, 2, 3) for v in (0, 8)}
    chosen = finalists(Surface(speedups), default=Cell(1, 1, 8), count=5)
    [adaptive] = [trial for trial in chosen if trial.policy == "adaptive"]
    assert [trial.cell for trial in chosen] == [
        Cell(4, 3, 0), Cell(4, 3, 0), Cell(4, 2, 0), Cell(4, 1, 0), Cell(3, 3, 0), Cell(2, 3, 0), Cell(1, 1, 8),
    ]  # fmt: skip
    assert all(trial.policy == "fixed" for trial in chosen if trial is not adaptive)
    assert adaptive.interval is None, "nobody predicted it"


def test_the_best_copies_race_beside_the_exits():
    alone = {(0, 0, 0, m, n): 1.2 + m / 100 + n / 1000 for m in (1, 2, 3) for n in (4, 8)}
    beside = {(2, 4, 0, m, n): 1.3 - m / 100 + n / 1000 for m in (1, 2, 3) for n in (4, 8)}
    surface = Surface({(2, 4, 0): 0.6, (3, 4, 0): 0.5}, [*alone.items(), *beside.items()])
    chosen = finalists(surface, default=Cell(0, 0, 0, 1, 4))
    told = [(trial.cell, trial.policy) for trial in chosen]
    both = [Cell(2, 4, 0, 1, 8), Cell(2, 4, 0, 1, 4)]
    lookup = [Cell(0, 0, 0, 3, 8), Cell(0, 0, 0, 3, 4), Cell(0, 0, 0, 1, 4)]
    assert told == [
        (both[0], "fixed"), (both[0], "adaptive"), (both[1], "fixed"), *((cell, "fixed") for cell in lookup),
        (Cell(2, 4, 0), "fixed"), (Cell(2, 4, 0), "adaptive"), (Cell(3, 4, 0), "fixed"),
    ]  # fmt: skip


def test_the_other_policies_race_beside_the_fixed_one():
    surface = Surface({(2, 4, 0): 1.5})
    surface.confident = replace(surface.cells[0], speedup=1.6, confidence=0.4, interval=(1.5, 1.7))
    first, second, third = finalists(surface)
    assert (first.options["policy"], first.options["confidence"]) == ("confidence", 0.4)
    assert second.options["policy"] == "fixed"
    assert (first.interval, second.interval, third.interval) == ((1.5, 1.7), (1.5, 1.5), None)
    assert (third.cell, third.options["policy"]) == (second.cell, "adaptive")
    assert "confidence" not in {**second.options, **third.options}


def test_the_worse_half_is_dropped_after_every_rung_and_the_winner_runs_on(scripted, lm):
    ranked = halving(lm, trials(1, 4, 2, 3), PROMPTS, 8, seconds=30, clock=Clock())
    assert [trial.cell.exit_layer for trial in ranked] == [4, 3, 2, 1]
    runs = [trial.of for trial in ranked]
    assert runs[0] > runs[1] > runs[2] == runs[3] >= tune.LEAST_TURNS
    found = ranked[0].measured()
    assert (found.ratio, found.low, found.high) == pytest.approx((1.4, 1.4, 1.4))
    told = tune.tuned(Predictions(), ranked)["best"]
    assert (told["exit_layer"], told["mode"], told["interval"]) == (4, "self-speculative", None)
    assert [told["measured_speedup"], *told["measured_interval"]] == pytest.approx([1.4] * 3)
    assert ranked[0].record()["acceptance"] == 0.5
    assert list(ranked[0].seconds) == [0, 1, 2], "prompts go round"


def test_the_winners_gain_is_told_by_runs_that_did_not_choose_it(monkeypatch, lm):
    """Two settings no faster than plain decoding, one of them lucky while both race."""

    def decoded(self, trial, prompts, budget):
        lucky = trial is not None and trial.cell.exit_layer == 2 and self.turns <= tune.LEAST_TURNS
        return tune._Run([[1, 1]] * len(prompts), 3.0 if lucky else 1.0, 4, 2)

    monkeypatch.setattr(Race, "_decoded", decoded)
    [winner, _] = halving(lm, trials(1, 2), [[n] for n in range(20)], 8, seconds=0, clock=Clock())
    assert winner.cell.exit_layer == 2
    assert winner.measured().ratio == 1
    assert winner.mode == "ar"
    assert len(winner.seconds) == tune.LAST_TURNS


def test_no_time_at_all_still_gives_every_rung_its_least_turns(scripted, lm):
    ranked = halving(lm, trials(1, 2), PROMPTS[:1], 8, seconds=1, clock=Clock())
    assert ranked[0].of == 2 * tune.LEAST_TURNS
    assert len(ranked[0].seconds) == 1


def test_a_prompt_seen_often_counts_once(lm):
    trial = Trial(Cell(2, 2, 0), 1.0, seconds={0: [(2.0, 1.0)] * 9, 1: [(4.0, 2.0)], 2: [(3.0, 6.0)]})
    assert trial.measured().ratio == 1.0
    alone = Trial(Cell(2, 2, 0), 1.0, seconds={0: [(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)]})
    assert alone.measured().low < 2.0 < alone.measured().high, "with one prompt its repeats are all there is"


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_race_decodes_plainly_and_with_every_trial_and_compares_outputs(lm, batch_size):
    groups = [PROMPTS[i : i + batch_size] for i in range(0, 3, batch_size)]
    race = Race(lm, groups, 12)
    racing = [Trial(Cell(2, 3, 0), 1.0), Trial(Cell(3, 2, 24), 1.0)]
    for _ in range(2):
        race.turn(racing)
    for trial in racing:
        assert trial.of == sum(map(len, groups[:2]))
        assert trial.differing == []
        assert trial.drafted >= trial.accepted > 0
        assert all(value > 0 for pairs in trial.seconds.values() for pair in pairs for value in pair)


def test_prompts_whose_output_differs_are_named(monkeypatch, lm):
    def decoded(self, trial, prompts, budget):
        return tune._Run([[prompt[0] if trial and prompt[0] == 3 else 0, 1] for prompt in prompts], 1.0, 1, 1)

    monkeypatch.setattr(Race, "_decoded", decoded)
    race, [trial] = Race(lm, [PROMPTS[:2], PROMPTS[2:]], 8), trials(2)
    race.turn([trial])
    race.turn([trial])
    assert (trial.differing, trial.record()["equal"], trial.of) == ([2], 2, 3)


def test_prompts_that_end_at_once_are_passed_over(lm):
    first = lm.generate(PROMPTS[1], max_new_tokens=1, mode="ar").tokens
    second = lm.generate(PROMPTS[0], max_new_tokens=8, mode="ar").tokens
    assert first[0] not in second[:2]
    lm.generation_config = type("Config", (), {"eos_token_id": first})
    race, [trial] = Race(lm, [[PROMPTS[1]], [PROMPTS[0]]], 8), trials(2)
    race.turn([trial])
    assert list(trial.seconds) == [1]
    with pytest.raises(UserError, match="nothing to time"):
        Race(lm, [[PROMPTS[1]]], 8).turn([trial])


def test_where_engines_are_kept_every_setting_has_its_own_and_captures_before_it_is_timed(lm):
    lm.engines.keep = True
    race, racing = Race(lm, [[PROMPTS[0]]], 8), trials(2, 3)
    race.turn(racing)
    engines = {id(face.engines.last) for face in race.faces.values()}
    assert len(engines) == 3
    race.turn(racing)
    assert {id(face.engines.last) for face in race.faces.values()} == engines
    assert all(trial.of == 2 and not trial.differing for trial in racing)


# -- what is written -----------------------------------------------------------------------------------------


@pytest.fixture
def own(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "own")


def entry(path):
    return json.loads((path / "config.json").read_text())["layerskip"]


def test_the_choice_becomes_the_default_of_the_checkpoint(own):
    lm = layerskip.load(own, device="cpu")
    winner = Trial(Cell(2, 3, 0), 1.2, seconds={0: [(1.5, 1.0)], 1: [(1.6, 1.0)]})
    assert save_choice(lm, winner) == own / "config.json"
    assert entry(own) == {
        "exit_layer": 2, "draft_length": 3, "draft_vocab_size": 0, "mode": "self-speculative", "policy": "fixed",
        "drafter": "exit",
    }  # fmt: skip
    stats = layerskip.load(own, device="cpu").generate("hello", max_new_tokens=8).stats
    assert (stats["mode"], stats["exit_layer"], stats["draft_length"]) == ("self-speculative", 2, 3)


def test_what_is_not_faster_leaves_plain_decoding_the_default(own):
    save_choice(
        layerskip.load(own, device="cpu"),
        Trial(Cell(2, 3, 0), 1.2, 0.4, "confidence", seconds={0: [(0.9, 1.0)], 1: [(1.6, 1.0)]}),
    )
    assert (entry(own)["mode"], entry(own)["drafter"]) == ("ar", "off")
    assert (entry(own)["policy"], entry(own)["confidence"]) == ("confidence", 0.4)
    lm = layerskip.load(own, device="cpu")
    assert lm.generate("hello", max_new_tokens=8).stats["mode"] == "ar"
    asked = lm.generate("hello", max_new_tokens=8, mode="self-speculative", match_min=2).stats
    assert asked["drafter"] == "lookup", "who asks for drafts all the same gets some"


FASTER = {0: [(1.5, 1.0)], 1: [(1.6, 1.0)]}


def test_copies_that_won_are_the_default_and_what_is_said_of_an_exit_stays(own):
    save_choice(layerskip.load(own, device="cpu"), Trial(Cell(2, 3, 0), 1.2, seconds=FASTER))
    before = entry(own)
    winner = Trial(Cell(match_min=2, copy_length=8), 1.3, seconds=FASTER)
    save_choice(layerskip.load(own, device="cpu"), winner)
    assert entry(own) == {**before, "drafter": "lookup", "match_min": 2, "copy_length": 8}
    lm = layerskip.load(own, device="cpu")
    stats = lm.generate("hello", max_new_tokens=8).stats
    assert (stats["drafter"], stats["draft_length"]) == ("lookup", 0)
    assert prediction.default_cell(lm) == winner.cell
    assert lm.generate("hello", drafter="exit", max_new_tokens=8).stats["exit_layer"] == 2


def test_both_that_won_are_measured_as_they_are_by_default_afterwards(own):
    lm = layerskip.load(own, device="cpu")
    winner = Trial(Cell(2, 3, 40, 1, 4), 1.3, seconds=FASTER)
    measured = lm.plan(Options.parse(winner.options))
    save_choice(lm, winner)
    assert (entry(own)["drafter"], entry(own)["match_min"], entry(own)["copy_length"]) == ("auto", 1, 4)
    again = layerskip.load(own, device="cpu")
    assert again.plan(Options()) == measured
    assert prediction.default_cell(again) == winner.cell
    save_choice(again, Trial(Cell(2, 3, 0), 1.2, seconds=FASTER))
    assert {"match_min", "copy_length"}.isdisjoint(entry(own)), "an exit alone copies nothing"


def test_a_draft_vocabulary_nobody_ranked_is_the_default_without_an_invented_ranking(own):
    lm = layerskip.load(own, device="cpu")
    save_choice(lm, Trial(Cell(2, 3, 40), 1.2, seconds={0: [(1.5, 1.0)]}))
    again = layerskip.load(own, device="cpu")
    assert again.ranked_vocabulary is None
    assert entry(own)["draft_vocab_size"] == 40
    assert 40 in candidate_sizes(again)
    again.stack.counters.reset()
    again.generate("hello", max_new_tokens=8)
    assert 40 in again.stack.counters.head_rows


def test_a_model_without_a_folder_cannot_be_written(lm):
    with pytest.raises(UserError, match="no folder"):
        save_choice(lm, Trial(Cell(2, 3, 0), 1.2, seconds={0: [(1.5, 1.0)]}))
