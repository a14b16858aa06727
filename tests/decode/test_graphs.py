"""Graphs by key: captured once, replayed on their own buffers, bounded, and never in the way."""

import warnings

import pytest
import torch

from layerskip.decode.rounds.graphs import FAILURES, Graphs
from rounds import Replayed, decode

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 20, 33], list(range(7, 18)), [40]]


class Doubling:
    """A program that notes which tensors it was given."""

    def __init__(self):
        self.inputs, self.counted = [], 0

    def __call__(self, inputs):
        self.inputs.append(inputs.data_ptr())
        return inputs * 2

    def count(self):
        self.counted += 1


def test_a_key_is_captured_once_and_replayed_on_the_same_buffer():
    graphs, first, second = Graphs(CPU, Replayed()), Doubling(), Doubling()
    for number in range(4):
        outputs = graphs.run("key", second if number else first, torch.tensor([number, 7]))
        assert outputs.tolist() == [2 * number, 14]
    assert (graphs.captured, graphs.replays, graphs.eager_runs, len(graphs)) == (1, 4, 0, 1)
    assert len(set(first.inputs)) == 1
    assert second.inputs == [], "the captured program serves its key"
    assert (first.counted, second.counted) == (4, 0)


def test_the_inputs_a_caller_holds_are_not_the_graphs_buffer():
    graphs, program, inputs = Graphs(CPU, Replayed()), Doubling(), torch.tensor([3])
    graphs.run("key", program, inputs)
    graphs.run("key", program, torch.tensor([5]))
    assert inputs.tolist() == [3]
    assert inputs.data_ptr() not in program.inputs


def test_without_capture_everything_runs_eagerly_and_counts():
    graphs, program = Graphs(CPU, capture=None), Doubling()
    assert [graphs.run("key", program, torch.tensor([n])).item() for n in range(3)] == [0, 2, 4]
    assert (graphs.captured, graphs.replays, graphs.eager_runs, program.counted) == (0, 0, 3, 3)


def test_a_capture_that_fails_warns_once_and_other_shapes_are_still_captured():
    """One failed capture turned graphs off for all shapes; a device may have been out of memory for a moment."""
    graphs, program = Graphs(CPU, Replayed(fails_at=2)), Doubling()
    graphs.run("good", program, torch.tensor([1]))
    with pytest.warns(RuntimeWarning, match="without a CUDA graph.*not permitted when stream is capturing$"):
        assert graphs.run("bad", program, torch.tensor([2])).item() == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graphs.run("bad", program, torch.tensor([3])).item() == 6
        assert graphs.run("other", program, torch.tensor([4])).item() == 8
        assert graphs.run("good", program, torch.tensor([5])).item() == 10
    assert (graphs.captured, graphs.replays, graphs.eager_runs) == (2, 3, 2)


def test_a_model_that_cannot_be_captured_is_tried_a_few_times_and_no_more():
    """Hugging Face modules of some families branch on values."""
    calls = []

    def refusing(function):
        calls.append(function)
        raise RuntimeError("operation not permitted")

    graphs = Graphs(CPU, refusing)
    with pytest.warns(RuntimeWarning, match="CUDA graphs are off"):
        doubled = [graphs.run(key, Doubling(), torch.tensor([key])).item() for key in range(9)]
    assert doubled == list(range(0, 18, 2))
    assert (len(calls), graphs.captured, graphs.eager_runs) == (FAILURES, 0, 9)


def test_other_errors_of_a_program_are_not_swallowed():
    def broken(inputs):
        raise AssertionError("ours")

    with pytest.raises(AssertionError, match="ours"):
        Graphs(CPU, Replayed()).run("key", broken, torch.tensor([1]))


def test_the_number_of_graphs_is_bounded_and_idle_ones_make_room():
    capture, program = Replayed(), Doubling()
    graphs = Graphs(CPU, capture, limit=2, patience=3)
    for key in ("a", "b"):
        graphs.run(key, program, torch.tensor([1]))
    with pytest.warns(RuntimeWarning, match="2 CUDA graphs are in use"):
        assert graphs.run("c", program, torch.tensor([2])).item() == 4
    assert (graphs.captured, graphs.eager_runs) == (2, 1)
    for number in range(3):
        graphs.run("b", program, torch.tensor([number]))
    assert graphs.run("c", program, torch.tensor([9])).item() == 18
    assert (graphs.captured, len(graphs)) == (3, 2)
    graphs.run("b", program, torch.tensor([1]))
    assert graphs.captured == 3, "the busy one stayed"


def graphs_of(record):
    graphs = record.engine.device_rounds.graphs
    return graphs.captured, graphs.replays, graphs.eager_runs


@pytest.mark.parametrize("draft_length", [0, 4])
def test_64_tokens_from_one_prompt_take_one_graph_per_length_bucket(llama, draft_length):
    for new, buckets in ((60, 1), (64, 2), (130, 3)):
        options = {"device_rounds": True, "capture": Replayed(), "capacity": 200}
        record = decode(llama[1], PROMPTS[:1], new, 2, draft_length, **options)
        rounds = len(record.rounds[0]) - 1
        assert graphs_of(record) == (buckets, rounds, 0)


def test_joining_and_leaving_rows_take_one_graph_per_batch_bucket(llama):
    prompts = [[i, i + 1] for i in range(2, 13)]
    options = {"device_rounds": True, "capture": Replayed(), "capacity": 64, "rows": 5}
    record = decode(llama[1], prompts, 0, 2, 3, each=lambda i: {"max_new_tokens": 5 + i * 3}, **options)
    captured, replays, eager = graphs_of(record)
    assert captured <= 7, "1, 2, 4 and all 5 rows, the former gathered or in place"
    assert replays > 20
    assert eager == 0
