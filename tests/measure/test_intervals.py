"""Medians and their bootstrap intervals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip.measure.intervals import interval, mean_of_ratios, ratio_of_sums, ratios

GROUPS = st.integers(1, 4).flatmap(
    lambda trials: st.lists(
        st.lists(st.floats(0.1, 10), min_size=trials, max_size=trials), min_size=1, max_size=5
    )
)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(GROUPS)
def test_the_interval_holds_the_median_and_repeats_with_the_seed(groups):
    found = interval(groups, seed=3)
    assert found.median == np.median([x for group in groups for x in group])
    assert found.low <= found.high
    assert min(map(min, groups)) <= found.low
    assert found.high <= max(map(max, groups))
    assert interval(groups, seed=3) == found


def test_equal_values_have_an_interval_of_no_width():
    found = interval([[2.0, 2.0], [2.0, 2.0]])
    assert (found.median, found.ci95) == (2.0, [2.0, 2.0])
    assert found.record() == {"median": 2.0, "ci95": [2.0, 2.0]}


def test_more_trials_of_the_same_prompts_do_not_narrow_what_prompts_disagree_about():
    """Resampling all ratios as if they were independent would."""
    prompts = [1.0, 1.2, 1.4, 1.6, 1.8]
    few, many = (interval([[p] * trials for p in prompts]) for trials in (1, 50))
    assert many.high - many.low >= 0.9 * (few.high - few.low)


def test_the_interval_covers_the_true_median_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(60):
        found = interval([[x] for x in rng.lognormal(0.0, 0.3, size=15)], seed)
        hits += found.low <= 1.0 <= found.high
    assert hits >= 50  # 57 expected; 50 is four standard deviations below


def test_ratios_pair_the_same_prompt_and_trial():
    assert ratios([[4.0, 9.0], [8.0]], [[2.0, 3.0], [2.0]]) == [[2.0, 3.0], [4.0]]


def test_a_ratio_of_sums_weighs_items_by_their_size():
    found = ratio_of_sums([90.0, 1.0], [30.0, 1.0])
    assert found.ratio == pytest.approx(91 / 31)
    assert found.ci95 == pytest.approx([1.0, 3.0])
    assert found.record() == {"ratio": found.ratio, "ci95": found.ci95}


def test_a_mean_of_ratios_counts_groups_alike_however_many_items_they_have():
    pairs = [([2.0] * 9, [1.0] * 9), ([1.0], [1.0])]
    mean = mean_of_ratios(pairs)
    assert (mean.ratio, mean.low, mean.high) == (1.5, 1.5, 1.5)
    above, below = [1.0, 3.0, 2.0, 4.0], [1.0, 1.0, 2.0, 1.0]
    assert mean_of_ratios([(above, below)]).ratio == ratio_of_sums(above, below).ratio
    assert mean_of_ratios([(above, below)]).low < mean_of_ratios([(above, below)]).high
