"""One pass over all exits: every chunk is what the model itself computes there, however sequences are batched."""

import pytest
import torch

import tiny
from layerskip.errors import UserError
from layerskip.measure.exits.states import chunks

L = tiny.NUM_LAYERS
RAGGED = [20, 3, 9, 1, 14]  # two of them longer than the sliding window
STACKS = [
    "llama",
    "llama+native",
    "mistral+native",
    "mistral",
    "qwen2+torch",
    "gemma2",
    "gpt2",
    "opt",
    "gpt_neox",
]


def sequences(lengths=RAGGED, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(2, tiny.VOCAB, (n,), generator=draw).tolist() for n in lengths]


@pytest.mark.parametrize("name", STACKS)
def test_every_exit_is_that_of_the_hugging_face_model_in_a_ragged_batch(name):
    model, stack = tiny.calibrated(name.partition("+")[0]), tiny.stack(name)
    texts = sequences()
    seen = dict.fromkeys(range(len(texts)), 0)
    for chunk in chunks(stack, texts, exits=[1, 3, L], size=8):
        with torch.no_grad():
            told = model(torch.tensor([texts[chunk.sequence]]), output_hidden_states=True)
        at = slice(chunk.positions.start, chunk.positions.stop)
        torch.testing.assert_close(chunk.full, told.logits[0, at], atol=2e-4, rtol=2e-4)
        found = dict(chunk.exits())
        assert list(found) == [1, 3, L]
        assert found[L] is chunk.full, "the last layer's head is read once"
        for k in (1, 3):
            with torch.no_grad():
                expected = stack.logits(told.hidden_states[k][0, at])
            torch.testing.assert_close(found[k], expected, atol=2e-4, rtol=2e-4)
        assert chunk.positions.start == seen[chunk.sequence]
        seen[chunk.sequence] = chunk.positions.stop
    assert list(seen.values()) == RAGGED


def test_chunks_come_in_input_order_from_the_first_position_wanted(llama):
    firsts = [18, 0, 4, 0, 13]
    found = [(c.sequence, c.positions) for c in chunks(llama[1], sequences(), [2], firsts, size=4)]
    assert found == [
        (0, range(18, 20)), (1, range(3)), (2, range(4, 8)), (2, range(8, 9)), (3, range(1)), (4, range(13, 14)),
    ]  # fmt: skip


def test_neighbours_run_together_within_the_limit_and_a_long_one_alone(llama):
    stack = llama[1]
    stack.counters.reset()
    for _ in chunks(stack, sequences([4, 5, 30, 2, 2, 2]), [2], batch_tokens=12):
        pass
    assert stack.counters.runs == {(0, L, 5): 1, (0, L, 30): 1, (0, L, 2): 1}


def test_only_the_exits_asked_for_are_held_and_a_draft_head_reads_them(llama):
    stack = llama[1]
    head = stack.reduced_head(range(10))
    [chunk] = chunks(stack, sequences([6]), [2])
    assert set(chunk.states) == {2}
    torch.testing.assert_close(chunk.logits(2, head), chunk.logits(2)[:, head.ids], atol=1e-5, rtol=1e-5)
    [(k, logits)] = chunk.exits(head)
    assert (k, logits.shape) == (2, (6, 10))


def test_no_sequences_are_no_chunks(llama):
    assert list(chunks(llama[1], [], [2])) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_exit_whose_logits_are_not_numbers_is_refused_when_it_is_read(llama, value):
    [chunk] = chunks(llama[1], sequences([6]), [2, L])
    with torch.inference_mode():
        chunk.states[2][3, 0] = value
    with pytest.raises(UserError, match="exit 2 are not all finite"):
        chunk.logits(2)
    assert chunk.logits(L) is chunk.full


@pytest.mark.parametrize(
    ("texts", "exits", "message"),
    [
        ([[5]], [0], "exit layer 0 is out of range"),
        ([[5]], [L + 1], f"exit layer {L + 1} is out of range"),
        ([[5], []], [1], "text 2 is empty"),
        ([[5] * (tiny.CONTEXT + 1)], [1], f"text 1 has {tiny.CONTEXT + 1} tokens"),
    ],
)
def test_what_the_model_cannot_take_is_refused_before_anything_runs(llama, texts, exits, message):
    llama[1].counters.reset()
    with pytest.raises(UserError, match=message):
        list(chunks(llama[1], texts, exits))
    assert not llama[1].counters.runs
