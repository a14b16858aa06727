"""Step times for the cost model: the right parts are run, whatever time they take."""

import pytest
import torch

import tiny
from layerskip.measure.speed.steps import Workbench, head_times, step_cost, timed
from rounds import decode

L, K = tiny.NUM_LAYERS, 3
CONTEXT = [5, 6, 7, 8, 9]


@pytest.fixture
def table(llama):
    made = Workbench(llama[1], CONTEXT, K)
    llama[1].counters.reset()
    return made


def test_every_part_of_a_round_is_measured_once_per_turn(table):
    head = table.stack.reduced_head(range(10))
    cost = step_cost(table, exit_layer=2, draft_head=head, repeats=2)
    counters = table.stack.counters
    assert counters.runs == {(0, L, 1): 3, (0, 2, 1): 3 * (K + 1), (2, L, K + 1): 3}
    assert counters.head_rows == {tiny.VOCAB: 3 + 3 * (K + 1), 10: 3 * (K + 1)}, "K in drafting, one alone"
    assert min(cost.layers, cost.head, cost.draft_head, cost.verify, cost.verify_head) > 0
    assert cost.speedup(K, 2.0) > 0


def test_heads_are_priced_by_size_and_parts_take_turns(table):
    heads = {8: table.stack.reduced_head(range(8)), tiny.VOCAB: None}
    assert set(head_times(table, heads, repeats=1)) == {8, tiny.VOCAB}
    order = []
    timed({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"), repeats=2)
    assert order == ["a", "b"] * 3


def test_the_workbench_holds_a_real_context_and_tells_what_a_token_costs(table):
    heads, size = 2, 8
    assert table.token_bytes == L * 2 * heads * size * 4
    with torch.inference_mode():
        assert table.headed(table.passed(L)) == decode(table.stack, [CONTEXT], 1).tokens[0]


def test_a_context_of_one_token_is_enough(llama):
    table = Workbench(llama[1], [5], 0)
    with torch.inference_mode():
        assert len(table.headed(table.passed(L))) == 1
