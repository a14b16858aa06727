"""Rounds worked out for exits, copies and both are those the engine takes, draft by draft."""

import itertools
from collections import Counter

import numpy as np
import pytest

import tiny
from layerskip.checkpoint.facts import Facts
from layerskip.decode.control import Choice, Controller, Copying, Prices
from layerskip.decode.copies import best_lengths
from layerskip.decode.generation import by_source
from layerskip.decode.language_model import LanguageModel
from layerskip.decode.options import Options
from layerskip.measure.exits.continuations import Continuation, continuations, observed
from layerskip.measure.exits.sources import Said, replay_sources
from layerskip.model.cost import RowCosts
from layerskip.watch import silent
from pairwise import matrix

pytestmark = pytest.mark.matrix
PROMPTS = [[5, 9, 20, 33, 5, 9, 20], [40], [3, 1, 4, 1, 5, 9, 2, 6], [7, 7, 7]]
NEW = 40
LOOKUP = {"drafter": "lookup", "policy": "fixed"}
BOTH = {"drafter": "auto", "policy": "fixed"}
FAMILIES = ["llama", "llama+native", "gpt2"]
EXITS = {
    "alone": {},
    "E 2": {"exit_layer": 2, "draft_length": 3},
    "E 1": {"exit_layer": 1, "draft_length": 8, "guard": False},
}
CELLS = matrix(FAMILIES, (1, 2, 3), (1, 4, 16), EXITS)
FREE = RowCosts(((1, 1.0), (64, 1.0)))


@pytest.fixture(params=FAMILIES)
def lm(request):
    made = LanguageModel(tiny.stack(request.param))
    made.family, made.facts = request.param, Facts(exits=(1, 2))
    return made


def repeating(lm):
    """Prompts that have the answer's beginning in them, so that copies are kept."""
    for prompt in PROMPTS:
        yield [*prompt, *lm.generate(prompt, mode="ar", max_new_tokens=9).tokens, 1, *prompt]


def heard(lm, prompt, new=NEW):
    [found] = continuations(lm, [prompt], new, silent)
    seen = observed(lm, [found], [1, 2], [0], [2], silent)
    return found, {e: Said(seen.bits[e, 0][0], seen.confidence[e, 0][0]) for e in (1, 2)}


def replayed(lm, found, said, options, new=NEW):
    """What the replay says, by the very controller that the engine would be given."""
    call = lm.call(Options.parse(options))
    assert not call.plan.timed
    return replay_sources(found, call.controller(), said, lambda *round: 1.0, new, call.eos)


def engines(lm, prompt, options, new=NEW):
    rounds = list(lm.stream(prompt, max_new_tokens=new, **options))
    return [round for round in rounds if round.source != "prefill"]


def columns(rounds):
    return [(r.drafted, r.accepted, len(r.tokens), int(r.source == "lookup")) for r in rounds]


def played(rounds):
    names = ("drafted", "accepted", "tokens", "copied")
    return list(zip(*(getattr(rounds, name).tolist() for name in names), strict=True))


def test_the_rounds_of_lookup_and_of_both_are_the_engines(lm):
    seen = Counter()
    pages = [heard(lm, prompt) for prompt in [*PROMPTS, *repeating(lm)]]
    for family, match_min, copy_length, name in CELLS:
        if family != lm.family:
            continue
        options = {"match_min": match_min, "copy_length": copy_length, **EXITS[name]}
        options |= LOOKUP if name == "alone" else BOTH
        for found, said in pages:
            expected, real = replayed(lm, found, said, options), engines(lm, found.prompt, options)
            assert played(expected) == columns(real)
            assert expected.by_source == by_source(real)
            assert expected.plain_share == sum(not r.draft for r in real) / len(real)
            for source, counts in expected.by_source.items():
                seen[source, name] += counts["accepted"]
    assert len(seen) == 5, "lookup alone, and beside each of two exits that draft"
    assert min(seen.values()) > 0, seen


def test_an_end_of_sequence_ends_the_rounds_where_it_ends_the_output(lm):
    options, ends = {**BOTH, "exit_layer": 2, "draft_length": 4, "guard": False}, Counter()
    for prompt in PROMPTS:
        plain = lm.generate(prompt, mode="ar", max_new_tokens=NEW).tokens
        for eos in list(dict.fromkeys(plain[1:]))[1:8:2]:
            lm.generation_config = type("Config", (), {"eos_token_id": eos})
            expected, real = replayed(lm, *heard(lm, prompt), options), engines(lm, prompt, options)
            # An end drafted by mistake cuts an exit's draft short; what is accepted and committed is the same.
            assert [r[1:] for r in played(expected)] == [r[1:] for r in columns(real)]
            if real and real[-1].accepted == len(real[-1].tokens):
                ends[real[-1].source] += 1
        lm.generation_config = None
    assert ends["exit"], "the test needs ends that were drafted"


def test_a_copied_end_of_sequence_is_the_last_draft():
    told = [5, 6, 7, 2]
    controller = Controller(Prices(5, 0.5, 0.5), (), copying=Copying(1, 8, FREE), timed=False)
    found = Continuation([5, 6, 7, 2, 1], told, ended=True)
    rounds = replay_sources(found, controller, {}, lambda *round: 1.0, 9, frozenset([2]))
    assert played(rounds) == [(3, 3, 3, 1)]


def test_budgets_cut_drafts_as_in_the_engine(lm):
    for new, prompt in itertools.product((2, 3, 5), PROMPTS[::2]):
        page = heard(lm, prompt, new)
        for options in (LOOKUP, {**BOTH, "exit_layer": 2, "draft_length": 4}):
            expected = replayed(lm, *page, options, new)
            assert played(expected) == columns(engines(lm, prompt, options, new))


def test_drafting_stops_before_a_token_the_exit_is_unsure_of():
    said = {2: Said(np.array([1, 1, 1, 0, 1, 1], bool), np.array([0.9, 0.2, 0.9, 0.2, 0.9, 0.9]))}
    controller = Controller(Prices(5, 0.5, 0.5), (Choice(2, 4, 0.5),), guard=False, timed=False)
    found = Continuation([1], [9, 8, 7, 6, 5, 4, 3], ended=False)
    rounds = replay_sources(found, controller, said, lambda *round: 1.0, 7, frozenset())
    assert played(rounds) == [(1, 1, 2, 0), (1, 1, 2, 0), (1, 1, 2, 0)]
    assert rounds.looked.tolist() == [1, 1, 0], "the last draft was all the budget allowed"


def test_the_guard_gives_up_an_exit_that_never_agrees_and_looks_at_it_again():
    """With seconds as priced, a timed controller goes by them: it begins with drafts and ends with plain steps."""
    length = 400
    said = {2: Said(np.zeros(length, bool), np.ones(length))}
    prices, asked = Prices(20, 0.5, 0.1), []
    controller = Controller(prices, (Choice(2, 2),), trained=True, guard=True)
    found = Continuation([1], list(range(length + 1)), ended=False)

    def seconds(choice, drafted):
        asked.append(choice)
        return prices.round(choice.exit_layer, drafted)

    rounds = replay_sources(found, controller, said, seconds, length + 1, frozenset())
    assert rounds.drafted[0] == 2
    assert rounds.drafted[100:].sum() == 0
    assert any(choice.probes == (2,) for choice in asked)
    assert controller.agreement(2) < 0.05
    several = Controller(prices, (Choice(2, 2),), trained=True, guard=True)
    replay_sources(found, several, said, seconds, length + 1, frozenset(), num_rows=3)
    assert set(several._books) == {4}, "three rows are timed as up to four"


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("dear", [0.2, 0.6, 2.0])
def test_drafts_are_cut_where_a_position_costs_more_than_it_brings(dear, num_rows):
    costs, draws = RowCosts(((1, 1.0), (64, 1.0 + 63 * dear))), np.random.default_rng(0)
    tokens = list(range(30))
    said = Said(draws.random((4, 29)) < 0.7, draws.random((4, 29)))
    found = Continuation([50, 51], tokens, ended=False)
    prices = Prices(4, 0.1, 0.1, costs)
    arm = Choice(0, 4, costs=costs)
    cut, whole = (
        replay_sources(
            found,
            Controller(prices, [one], trained=True, guard=False),
            {0: said},
            lambda *round: 1.0,
            30,
            frozenset(),
            num_rows,
        )
        for one in (arm, Choice(0, 4))
    )
    assert whole.drafted.max() == 4
    place = 0
    for drafted, committed in zip(cut.drafted, cut.tokens, strict=True):
        limit = min(4, 29 - place - 1)
        likely = [said.confidence[i, place + i] for i in range(limit)]
        wanted, _ = best_lengths([likely] * num_rows, lambda n: costs.more(num_rows, n))
        assert drafted == wanted[0]
        place += committed
    assert place == 29
    assert cut.drafted.sum() < whole.drafted.sum()
