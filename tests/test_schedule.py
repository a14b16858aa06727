"""Drop rates, exit weights and curricula: the published tables, and what holds for every setting."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip.errors import UserError
from layerskip.train.objective.schedule import Schedule, drop_rates, enabled_exits, exit_weights

depths = st.integers(1, 60)


def test_drop_rates_follow_the_published_profiles():
    """D(0) = 0, D(L-1) = 1 for the paper's profile; its mean at 32 layers is 0.4445."""
    rates = drop_rates(32, 0.1)
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(0.1)
    assert sum(rates) / 32 / 0.1 == pytest.approx(0.4445, abs=5e-5)
    assert rates[10] == pytest.approx(0.1 * (2 ** (10 / 31) - 1))
    assert drop_rates(5, 1.0, depth="linear") == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert drop_rates(3, 0.3, depth="uniform") == pytest.approx([0.3] * 3)


@pytest.mark.parametrize(
    ("time", "first", "middle", "last"),
    [("const", 1, 1, 1), ("exp", 0, math.sqrt(2) - 1, 1), ("linear_down", 1, 0.5, 0)],
)
def test_drop_rates_change_over_time(time, first, middle, last):
    found = [drop_rates(4, 0.2, time=time, step=step, total=101)[-1] / 0.2 for step in (0, 50, 100)]
    assert found == pytest.approx([first, middle, last])


def test_exit_weights_follow_the_published_formula():
    """e(k) of a model of four layers, l = k - 1: l(l+1)/2 below the last, (L-1) + (L-1)(L-2)/2 for the last."""
    raw = {2: 1, 3: 3, 4: 6}
    assert exit_weights(4, [1, 2, 3, 4], 1.0) == pytest.approx({k: e / 10 for k, e in raw.items()})
    assert exit_weights(4, [3, 4], 0.2) == pytest.approx({3: 0.6 / 4.2, 4: 3.6 / 4.2})
    assert exit_weights(32, [8, 32], 0.2)[8] == pytest.approx(5.6 / (5.6 + 31 + 0.2 * 31 * 30 / 2))


def test_the_first_exit_has_no_weight_in_the_paper():
    assert exit_weights(6, [1, 6], 1.0) == {6: 1.0}


def test_other_weightings():
    assert exit_weights(6, [2, 4, 6], 0.5, "uniform") == pytest.approx({2: 0.25, 4: 0.25, 6: 0.5})
    assert exit_weights(6, [2, 4, 6], 1.0, {2: 3.0, 4: 0.0}) == pytest.approx({2: 0.75, 6: 0.25})


@given(depths, st.floats(0, 1), st.sampled_from(["paper", "uniform"]))
def test_weights_sum_to_one_and_leave_out_zeros(num_layers, e_scale, weighting):
    weights = exit_weights(num_layers, range(1, num_layers + 1), e_scale, weighting)
    assert sum(weights.values()) == pytest.approx(1.0)
    assert min(weights.values()) > 0
    assert num_layers in weights


@given(depths.filter(lambda n: n > 1), st.integers(1, 59), st.integers(0, 10_000))
def test_rotation_visits_every_exit_once_a_turn(num_layers, rotation, start):
    rotation = min(rotation, num_layers - 1)
    steps = [enabled_exits(num_layers, "rotational", start + t, 1, rotation) for t in range(rotation)]
    early = [k for enabled in steps for k in enabled if k < num_layers]
    assert sorted(early) == list(range(1, num_layers))
    assert all(enabled[-1] == num_layers for enabled in steps)


def test_rotation_of_all_layers_is_one_exit_a_step():
    assert enabled_exits(5, "rotational", 0, 9, rotation=4) == [1, 5]
    assert enabled_exits(5, "rotational", 6, 9) == [3, 5]
    assert enabled_exits(30, "rotational", 1, 9, rotation=2, exits=[4, 6, 8, 12]) == [6, 12, 30]


def test_a_rotation_longer_than_the_exits_is_one_exit_a_step():
    """`finetune exits=[2]` was refused: the recipe's rotation of 2 was longer than the one exit."""
    for step in range(5):
        assert enabled_exits(30, "rotational", step, 9, rotation=2, exits=[2]) == [2, 30]
    assert Schedule(30, exits=(2,), rotation=2, weighting="uniform").trained == (2,)
    steps = [enabled_exits(30, "rotational", step, 9, rotation=9, exits=[4, 6]) for step in range(4)]
    assert steps == [[4, 30], [6, 30], [4, 30], [6, 30]]


@given(depths, st.integers(1, 500))
def test_gradual_starts_at_the_end_and_is_complete_at_half(num_layers, half):
    total = 2 * half
    assert enabled_exits(num_layers, "gradual", half, total) == list(range(1, num_layers + 1))
    counts = [len(enabled_exits(num_layers, "gradual", step, total)) for step in range(total)]
    assert counts == sorted(counts)
    assert enabled_exits(num_layers, "gradual", 0, total) == [num_layers]


def test_a_single_step_and_a_single_layer_divide_by_nothing():
    for time in ("const", "exp", "linear_down"):
        for depth in ("exp", "linear", "uniform"):
            assert all(0 <= rate <= 1 for rate in drop_rates(1, 0.5, depth, time, 0, 1))
    assert exit_weights(1, [1], 1.0) == {1: 1.0}
    assert enabled_exits(1, "rotational", 3, 1) == [1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"p_max": 1.5}, "p_max is 1.5"),
        ({"e_scale": -1.0}, "e_scale is -1.0"),
        ({"curriculum": "rotate"}, "rotational"),
        ({"drop_depth": "expo"}, "'exp'"),
        ({"drop_time": "linear"}, "linear_down"),
        ({"weighting": "papers"}, "'paper'"),
        ({"exits": (40,)}, "30 layers"),
        ({"exits": (30,)}, "no early exit"),
        ({"exits": ()}, "no early exit"),
        ({"exits": (1,)}, "no weight, so no exit"),  # used to train the last layer alone, silently
        ({"exits": (4, 8), "weighting": {4: 0.0, 8: 0.0}}, "no weight, so no exit"),
        ({"rotation": 0}, "rotation is 0"),
        ({"curriculum": "fixed"}, "list of exits"),
        ({"weighting": {4: -1.0}}, "0 or more"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_when_it_is_made(settings, says):
    with pytest.raises(UserError, match=says):
        Schedule(30, **settings)


def test_trained_exits_are_those_with_a_weight_at_some_step():
    assert Schedule(5).trained == (2, 3, 4)
    assert Schedule(5, weighting="uniform").trained == (1, 2, 3, 4)
    assert Schedule(30, exits=(4, 8)).trained == Schedule(30, exits=(8, 30, 4)).candidates == (4, 8)
    assert Schedule(5, e_scale=0.0).trained == ()
