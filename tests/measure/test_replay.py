"""Rounds worked out from one pass are those the engine takes, and grids of them cost nothing."""

import numpy as np
import pytest

import tiny
from layerskip.decode.language_model import LanguageModel
from layerskip.measure.exits.continuations import continuations, observed
from layerskip.measure.exits.replay import by_place, joined, replay
from layerskip.watch import silent
from pairwise import matrix

pytestmark = pytest.mark.matrix
PROMPTS = [[5, 6, 7, 8], [9], [3, 1, 4, 1, 5, 9, 2, 6]]
NEW = 30


FAMILIES, SIZES = ["llama", "llama+native", "gpt2"], (0, 24)
CELLS = matrix(FAMILIES, SIZES, (1, 2, 4), (1, 3, 8))


@pytest.fixture(params=FAMILIES)
def lm(request):
    made = LanguageModel(tiny.stack(request.param))
    made.family = request.param
    return made


def rounds_of(lm, prompt, **options):
    """What the engine did behind the prompt: (drafted, accepted, committed) of each round."""
    told = lm.stream(prompt, mode="self-speculative", max_new_tokens=NEW, **options)
    return [(r.drafted, r.accepted, len(r.tokens)) for r in told if r.source != "prefill"]


def played(rounds):
    return list(zip(*(column.tolist() for column in rounds[:3]), strict=True))


@pytest.mark.parametrize("size", SIZES, ids=["whole head", "draft vocabulary"])
def test_the_rounds_of_every_cell_are_the_engines(lm, size):
    found = continuations(lm, PROMPTS, NEW, silent)
    seen = observed(lm, found, [1, 2, 4], [size], [2], silent)
    kept = 0
    for *of, exit_layer, draft_length in CELLS:
        if of != [lm.family, size]:
            continue
        how = {"exit_layer": exit_layer, "draft_length": draft_length, "draft_vocab": size or "off"}
        for prompt, bits in zip(PROMPTS, seen.bits[exit_layer, size], strict=True):
            expected = replay(bits, draft_length, NEW - 1)
            assert played(expected) == rounds_of(lm, prompt, **how)
            kept += expected.accepted.sum()
    assert kept > 4, "the test needs drafts that are kept"


def test_an_end_of_sequence_ends_the_rounds_where_it_ends_the_output(lm):
    """The end is a token that plain decoding writes in the middle, so it is drafted, accepted and rejected."""
    drafted = 0
    for prompt in PROMPTS:
        plain = lm.generate(prompt, mode="ar", max_new_tokens=NEW).tokens
        for eos in list(dict.fromkeys(plain[1:]))[1:8:2]:
            lm.generation_config = type("Config", (), {"eos_token_id": eos})
            [one] = continuations(lm, [prompt], NEW, silent)
            seen = observed(lm, [one], [2], [0], [2], silent)
            assert one.ended == (eos in one.tokens)
            for draft_length in (1, 4):
                expected = replay(seen.bits[2, 0][0], draft_length, NEW - 1)
                real = rounds_of(lm, prompt, exit_layer=2, draft_length=draft_length)
                # An end drafted by mistake cuts a draft short; what is accepted and committed is the same.
                assert [r[1:] for r in played(expected)] == [r[1:] for r in real]
                drafted += expected.accepted[-1] == expected.tokens[-1] if len(expected.tokens) else 0
    assert drafted > 3, "the test needs ends that were drafted"


def test_the_pass_agrees_with_itself_at_the_last_layer(lm):
    found = continuations(lm, PROMPTS, NEW, silent)
    seen = observed(lm, found, [2], [0, 24], [1, 3], silent)
    assert seen.agreement[tiny.NUM_LAYERS] == seen.equal == 1
    assert list(seen.agreement) == [1, 2, 3, tiny.NUM_LAYERS]
    assert 0 < seen.agreement[2] < 1
    assert 0 <= seen.ties <= seen.near_ties < 0.5
    for bits, sure in zip(seen.bits[2, 24], seen.confidence[2, 24], strict=True):
        assert bits.shape == sure.shape == (1, NEW - 1)
        assert ((sure > 1 / 24) & (sure <= 1 + 1e-6)).all(), "of the reduced head"


def test_rounds_by_hand():
    bits = np.array([1, 1, 0, 0, 1, 1, 1, 0, 1], bool)
    #                K = 2: 2 + 1, 0 + 1, 2 + 1, 0 + 1 (one draft left beside the token behind it), 0 + 1
    rounds = replay(bits, 2)
    assert rounds.tokens.tolist() == [3, 1, 3, 1, 1]
    assert rounds.accepted.tolist() == [2, 0, 2, 0, 0]
    assert rounds.drafted.tolist() == [2, 2, 2, 1, 0]
    assert rounds.tokens_per_round == 9 / 5
    assert rounds.acceptance == 4 / 7
    assert by_place(rounds.drafted, rounds.accepted, 3) == [2 / 4, 2 / 3, None]


def test_drafting_stops_before_a_token_the_exit_is_unsure_of():
    bits = np.array([1, 1, 1, 0, 1, 1], bool)
    sure = np.array([0.9, 0.2, 0.9, 0.2, 0.9, 0.9])
    rounds = replay(bits, 4, confidence=sure, threshold=0.5)
    assert rounds.drafted.tolist() == [1, 1, 1]
    assert rounds.accepted.tolist() == [1, 1, 1]
    assert rounds.looked.tolist() == [1, 1, 0], "the last draft was all the budget allowed"
    plain = replay(bits, 4, confidence=sure, threshold=1.0)
    assert plain.tokens.tolist() == [1] * 6
    assert plain.drafted.sum() == 0


def test_a_threshold_of_nothing_is_the_fixed_policy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        bits, sure = rng.random(30) < 0.7, rng.random(30)
        fixed, free = replay(bits, 5), replay(bits, 5, confidence=sure, threshold=0.0)
        assert all((a == b).all() for a, b in zip(fixed, free, strict=True))
        assert fixed.tokens.sum() == 30


@pytest.mark.parametrize("length", [0, 1])
def test_outputs_of_one_token_have_no_rounds_and_of_two_a_plain_step(length):
    rounds = replay(np.ones(length, bool), 4)
    assert rounds.tokens.tolist() == [1] * length
    assert rounds.drafted.sum() == 0
    assert rounds.acceptance is None
    assert joined([rounds, rounds]).tokens.tolist() == [1] * 2 * length
