"""The engine: the exact work of a round, the cache after it, rows that come and go."""

import pytest
import torch

import tiny
from conftest import CLOSE
from layerskip.decode.engine import Engine
from layerskip.decode.request import Request
from layerskip.decode.sampling import Processing, Sampling
from layerskip.errors import UserError
from rounds import decode

L = tiny.NUM_LAYERS
PROMPT = [5, 9, 20, 33]


@pytest.fixture
def stack(llama):
    stack = llama[1]
    stack.counters.reset()
    return stack


def started(stack, *requests, capacity=128, **options):
    """An engine with the requests added and their prompts prefilled."""
    engine = Engine(stack, rows=len(requests), capacity=capacity, **options)
    for request in requests:
        engine.add(request)
    while any(engine.cache.lengths[row] < len(r.prompt) for row, r in enumerate(requests)):
        engine.step()
    stack.counters.reset()
    return engine


@pytest.mark.parametrize("exit_layer", [1, 2, 4])
@pytest.mark.parametrize("draft_length", [0, 1, 3, 8])
def test_a_round_does_exactly_the_work_of_the_method(stack, exit_layer, draft_length):
    engine = started(stack, Request(PROMPT, 64, exit_layer, draft_length))
    [round] = engine.step()
    k, counters = draft_length, stack.counters
    assert len(round.draft) == k
    drafting = {(0, exit_layer, 1): k + 1, (exit_layer, L, k + 1): 1}
    assert counters.runs == (drafting if k else {(0, L, 1): 1})
    assert counters.head_rows == {tiny.VOCAB: k + (k + 1)}
    assert counters.layer_tokens == round.layer_passes == (k + 1) * L


def test_a_round_with_a_reduced_head_drafts_with_it_and_verifies_with_the_full_one(stack):
    head = stack.reduced_head(range(10, 30))
    engine = started(stack, Request(PROMPT, 64, 2, 3), draft_head=head)
    [round] = engine.step()
    assert stack.counters.head_rows == {20: 3, tiny.VOCAB: 4}
    assert set(round.draft) <= set(range(10, 30))


def test_plain_decoding_runs_every_layer_once_and_one_head_row(stack):
    engine = started(stack, Request(PROMPT, 64))
    [round] = engine.step()
    assert stack.counters.runs == {(0, L, 1): 1}
    assert stack.counters.head_rows == {tiny.VOCAB: 1}
    assert (round.source, round.layer_passes, len(round.tokens)) == ("plain", L, 1)


def test_early_exit_decoding_never_touches_the_late_layers(stack):
    engine = started(stack, Request(PROMPT, 64, 2, unverified=True))
    [round] = engine.step()
    assert stack.counters.runs == {(0, 2, 1): 1}
    assert (round.source, round.layer_passes) == ("early-exit", 2)


def test_prefill_computes_the_head_for_the_last_position_only(stack):
    decode(stack, [list(range(2, 40))], 1, prefill_chunk=10)
    assert stack.counters.head_rows == {tiny.VOCAB: 1}
    assert stack.counters.runs == {(0, L, 10): 3, (0, L, 8): 1}


def test_a_batched_round_counts_the_tokens_of_each_row_and_no_padding(stack):
    """Rows of different draft lengths: the verification is padded, the counters see live tokens only."""
    requests = [Request(PROMPT, 64, 2, 3), Request([7, 8], 3, 2, 3, index=1)]  # the second may draft 1
    engine = started(stack, *requests)
    rounds = engine.step()
    assert [len(round.draft) for round in rounds] == [3, 1]
    assert stack.counters.runs == {(0, 2, 1): 4, (2, L, 4): 1}
    assert stack.counters.layer_tokens == sum(round.layer_passes for round in rounds) == (4 + 2) * L
    assert stack.counters.head_rows == {tiny.VOCAB: 3 + 1 + 4 + 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", tiny.STACKS)
def test_the_cache_after_every_round_equals_a_fresh_prefill_of_the_kept_tokens(family, dtype):
    """In every layer, for every row: the invariant of the method, checked against recomputation."""
    stack = tiny.stack(family, dtype)
    sampling = Processing(Sampling(temperature=0.8))
    requests = [
        Request(PROMPT, 12, 2, 3),
        Request(list(range(7, 18)), 12, 2, 3, index=1),
        Request([40], 12, 2, 3, index=2, processing=sampling),
    ]
    engine = Engine(stack, rows=3, capacity=64)
    for request in requests:
        engine.add(request)
    checked = 0
    while engine.busy:
        engine.step()
        for row in list(engine._rows):
            tokens, length = engine.tokens(row), engine.cache.lengths[row]
            if length < len(requests[row].prompt):
                continue
            assert length == len(tokens) - 1, "the last committed token is never cached"
            fresh = Engine(stack, rows=1, capacity=64)
            fresh.add(Request(tokens[:-1], 1, keep=True))
            fresh.step()
            for ours, theirs in zip(
                engine.cache.keys + engine.cache.values, fresh.cache.keys + fresh.cache.values, strict=True
            ):
                close = CLOSE[dtype] * max(1.0, theirs.abs().max().item())
                torch.testing.assert_close(ours[row, :, :length], theirs[0, :, :length], rtol=0, atol=close)
            checked += 1
    assert checked > 10


def test_rows_with_different_exits_form_groups_and_all_make_progress(stack):
    requests = [Request(PROMPT, 16, 1 + i % 3, 3, index=i) for i in range(5)] + [Request(PROMPT, 16, index=5)]
    engine = Engine(stack, rows=6, capacity=64)
    rows = {engine.add(request): [] for request in requests}
    groups = []
    while engine.busy:
        rounds = engine.step()
        groups.append({(round.exit_layer, round.source) for round in rounds})
        for round in rounds:
            rows[round.row] += round.tokens
    assert all(len(group) == 1 for group in groups), "one exit layer per step"
    assert len({tuple(tokens) for tokens in rows.values()}) == 1, "all exits give the same tokens"


def test_prompts_and_rounds_alternate_while_both_wait(stack):
    engine = started(stack, Request(PROMPT, 40), Request(PROMPT, 40, index=1), capacity=256, prefill_chunk=8)
    engine.cancel(1)
    engine.add(Request(list(range(2, 60)), 4, index=2))
    sources = [engine.step()[0].source for _ in range(8)]
    assert sorted(sources[:2]) == ["plain", "prefill"]
    assert sources == sources[:2] * 4


def test_a_cancelled_row_leaves_the_others_untouched_and_its_place_free(stack):
    alone = decode(stack, [PROMPT], 20, 2, 3).tokens[0]
    engine = Engine(stack, rows=2, capacity=64)
    first, second = engine.add(Request([40, 2], 20, 2, 3, index=1)), engine.add(Request(PROMPT, 20, 2, 3))
    tokens = []
    for _ in range(5):
        tokens += [t for round in engine.step() if round.row == second for t in round.tokens]
    engine.cancel(first)
    engine.cancel(first)  # twice is harmless
    third = engine.add(Request([7, 7], 4, 2, 3, index=2))
    assert third == first
    while engine.busy:
        tokens += [t for round in engine.step() if round.row == second for t in round.tokens]
    assert tokens == alone


def test_a_kept_row_is_reused_up_to_the_longest_common_prefix(stack):
    engine = Engine(stack, rows=1, capacity=128)
    row = engine.add(Request(PROMPT, 6, 2, 3, keep=True))
    while engine.busy:
        engine.step()
    longer = [*engine.tokens(row), 3, 4, 5]
    assert engine.add(Request(longer, 6, 2, 3, keep=True), row) == row
    rounds = []
    while engine.busy:
        rounds += engine.step()
    assert rounds[0].prompt_tokens == 4, "the last token of the turn before was not cached, three are new"
    fresh = decode(stack, [longer], 6).tokens[0]
    assert [t for round in rounds for t in round.tokens] == fresh


def test_a_row_cut_at_an_exit_is_prefilled_again_at_full_depth(stack):
    engine = Engine(stack, rows=1, capacity=128)
    row = engine.add(Request(PROMPT, 6, 2, unverified=True, keep=True))
    while engine.busy:
        engine.step()
    assert engine.cache.depths[row] == 2
    engine.add(Request(PROMPT, 6, keep=True), row)
    rounds = []
    while engine.busy:
        rounds += engine.step()
    assert rounds[0].prompt_tokens == len(PROMPT)
    assert [t for round in rounds for t in round.tokens] == decode(stack, [PROMPT], 6).tokens[0]


def test_rounds_report_what_they_did(stack):
    record = decode(stack, [PROMPT], 20, 2, 3)
    first, *rest = record.rounds[0]
    assert (first.source, first.prompt_tokens, len(first.tokens)) == ("prefill", len(PROMPT), 1)
    assert {round.source for round in rest} == {"exit"}
    assert [round.step_id for round in rest] == list(range(2, len(rest) + 2))
    assert all(round.step_s > 0 and round.draft_length == 3 and round.exit_layer == 2 for round in rest)
    assert rest[-1].finish_reason == "length"
    assert all(round.tokens[: round.accepted] == round.draft[: round.accepted] for round in rest)


def test_log_probabilities_are_those_of_the_full_model(llama):
    model, stack = llama
    record = decode(stack, [PROMPT], 12, 2, 3, logprobs=True)
    tokens = record.tokens[0]
    given = [x for round in record.rounds[0] for x in round.logprobs]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(given), wanted, rtol=0, atol=CLOSE[torch.float32])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(PROMPT, 4, 0, 3), "exit layer 0"),
        (Request(PROMPT, 4, L, 3), f"exit layer {L}"),
        (Request(PROMPT, 4, L + 1), f"exit layer {L + 1}"),
        (Request(PROMPT, 4, L, unverified=True), f"exit layer {L}"),
        (Request(PROMPT, 4, 2, -1), "draft length -1"),
        (Request(PROMPT, 0), "max_new_tokens is 0"),
        (Request([], 4), "prompt is empty"),
        (Request([3] * 129, 4), "129 tokens, the context is 128"),
        (Request([tiny.VOCAB], 4), f"token {tiny.VOCAB}"),
        (Request([-1], 4), "token -1"),
    ],
)
def test_a_request_that_cannot_be_honoured_says_why_and_takes_no_row(stack, request_, message):
    engine = Engine(stack, rows=1, capacity=128)
    with pytest.raises(UserError, match=message):
        engine.add(request_)
    engine.add(Request(PROMPT, 1))


def test_a_full_engine_says_so(stack):
    engine = Engine(stack, rows=1, capacity=32)
    engine.add(Request(PROMPT, 1))
    with pytest.raises(UserError, match="all rows"):
        engine.add(Request(PROMPT, 1))
