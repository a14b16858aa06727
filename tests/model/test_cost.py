"""The cost model reproduces the numbers it is meant for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip.model.cost import (
    Cost,
    acceptance_from,
    best_draft_vocabulary,
    break_even,
    draft_vocabulary_speedups,
    expected_tokens,
    per_token_from,
    tokens_per_round,
)

SMOLLM2 = Cost(layers=30, early=6, head=8.0, draft_head=8.0)  # SmolLM2-135M: the head costs eight layers
SMOLLM2_8K = Cost(layers=30, early=6, head=8.0, draft_head=1.3)


def test_limits_of_the_small_model_at_full_acceptance():
    assert SMOLLM2.speedup(8, tokens_per_round(8, 1.0)) == pytest.approx(2.28, abs=0.01)
    assert SMOLLM2_8K.speedup(8, tokens_per_round(8, 1.0)) == pytest.approx(3.54, abs=0.01)
    assert SMOLLM2_8K.speedup(8, tokens_per_round(8, 0.7)) == pytest.approx(2.59, abs=0.02)


@pytest.mark.parametrize(
    ("layers", "exit_layer", "draft_length", "acceptance", "published"),
    [(32, 8, 12, 0.689, 1.86), (32, 8, 12, 0.546, 1.54), (32, 8, 6, 0.671, 1.83), (40, 15, 12, 0.745, 1.81)],
)
def test_published_speedups_are_met_within_a_fifth(layers, exit_layer, draft_length, acceptance, published):
    head = 32000 * 4096 / 202e6  # in layers
    predicted = Cost(layers, exit_layer, head, head).speedup(
        draft_length, tokens_per_round(draft_length, acceptance)
    )
    assert predicted == pytest.approx(published, rel=0.2)


def test_break_even_is_where_the_speedup_is_one_for_long_drafts():
    cost = Cost(32, 8, 0.65, 0.65)
    for draft_length in (1, 4, 12):
        assert cost.speedup(draft_length, tokens_per_round(draft_length, break_even(cost))) == pytest.approx(
            1.0
        )


@given(st.floats(0, 1), st.integers(1, 16))
def test_the_two_acceptances_convert_into_each_other(per_token, draft_length):
    acceptance = acceptance_from(per_token, draft_length)
    assert 0 <= acceptance <= 1
    assert acceptance * draft_length == pytest.approx(sum(per_token**i for i in range(1, draft_length + 1)))
    assert acceptance_from(per_token_from(acceptance, draft_length), draft_length) == pytest.approx(
        acceptance
    )
    assert expected_tokens(draft_length, per_token) == pytest.approx(1 + acceptance * draft_length)


def test_drafting_nothing_yields_one_token_and_no_acceptance():
    assert (expected_tokens(0, 0.5), acceptance_from(0.5, 0)) == (1.0, 0.0)


def test_the_head_over_several_rows_may_cost_more_than_over_one():
    narrow, wide = Cost(30, 6, 8, 1.3), Cost(30, 6, 8, 1.3, verify=24, verify_head=10)
    assert wide.round(4) == narrow.round(4) + 2


def test_a_draft_vocabulary_is_worth_its_coverage_against_its_head():
    heads = {1000: 0.2, 8000: 1.3, 49152: 8.0}
    cost = Cost(layers=30, early=6, head=8.0, draft_head=8.0)
    covered = {1000: 0.6, 8000: 0.97, 49152: 1.0}
    speedups = draft_vocabulary_speedups(cost, 4, 0.8, heads, covered)
    assert best_draft_vocabulary(speedups) == 8000
    assert speedups[49152] == pytest.approx(cost.speedup(4, expected_tokens(4, 0.8)))
    everything = draft_vocabulary_speedups(cost, 4, 0.8, heads, dict.fromkeys(heads, 1.0))
    assert best_draft_vocabulary(everything) == 1000, "at equal coverage the cheapest head wins"
    assert best_draft_vocabulary({8: 1.0, 4: 1.0}) == 4
