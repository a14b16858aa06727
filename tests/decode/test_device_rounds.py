"""Rounds on the device are rounds on the host: same tokens, same statistics, one synchronisation."""

import itertools
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from conftest import CLOSE, FULL
from layerskip.decode.engine import Engine
from layerskip.decode.request import Failure, Request
from layerskip.decode.rounds import device as device_rounds
from layerskip.decode.rounds.device import Shape, device_law, device_round
from layerskip.decode.sampling import Processing, Sampling
from layerskip.model.step import Step
from pairwise import matrix, pairwise
from rounds import Replayed, decode

pytestmark = pytest.mark.matrix
L = tiny.NUM_LAYERS
PROMPTS = [[5, 9, 20, 33], list(range(7, 18)), [40]]
MIXED = ["llama", "llama+torch", "gemma2", "qwen2", "gpt2"]  # grouped heads, soft-caps, windows, positions
FAMILIES = tiny.STACKS if FULL else MIXED
WARM = Processing(Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01))
CELLS = pairwise(FAMILIES, (1, 2, L - 1), (0, 1, 3, 8), (0.0, 0.6, 0.9), (Processing(), WARM), (9, 24))


class Stacks(dict):
    def __missing__(self, family):
        self[family] = tiny.stack(family)
        return self[family]


@pytest.fixture(scope="module")
def stacks():
    return Stacks()


def told(record):
    """What a record says of every round, but for its time and its layers' work (the device drafts the full K)."""
    names = "tokens draft accepted drafted exit_layer draft_length source prompt_tokens finish_reason"
    return [
        [[getattr(round, name) for name in names.split()] for round in rounds] for rounds in record.rounds
    ]


def compared(stack, prompts, *args, **options):
    """Decode on the host, on the device and in graphs; returns the graphs' record after checking all agree."""
    host = decode(stack, prompts, *args, **options, device_rounds=False)
    eager = decode(stack, prompts, *args, **options, device_rounds=True)
    graphs = decode(stack, prompts, *args, **options, device_rounds=True, capture=Replayed())
    assert told(eager) == told(host)
    assert told(graphs) == told(host)
    return graphs


@pytest.mark.parametrize(
    ("family", "exit_layer", "draft_length", "confidence", "processing", "new"),
    CELLS,
    ids=lambda value: "" if isinstance(value, Processing) else None,
)
def test_rounds_are_those_of_the_host(stacks, family, exit_layer, draft_length, confidence, processing, new):
    how = {"processing": processing, "confidence": confidence, "seed": new}
    record = compared(stacks[family], PROMPTS, new, exit_layer, draft_length, **how)
    assert record.engine.device_rounds.graphs.replays > 0


@pytest.mark.parametrize("family", FAMILIES if FULL else MIXED[:1])
def test_greedy_rounds_are_those_of_the_host(stacks, family):
    seen = Counter()
    for exit_layer, draft_length in ((1, 3), (2, 8), (2, 3), (4, 1), (2, 0), (None, 0)):
        record = compared(stacks[family], PROMPTS, 32, exit_layer, draft_length)
        seen += record.accepted
        assert record.engine.device_rounds.graphs.replays > 0
    assert {kept for length, kept in seen if length == 3} == {0, 1, 2, 3}


@pytest.mark.parametrize("family", FAMILIES if FULL else MIXED[:1])
def test_sampled_rounds_draw_the_same_tokens_for_the_same_seed(stacks, family):
    kept = Counter()
    for seed, (exit_layer, draft_length) in enumerate([(2, 3), (2, 3), (4, 6), (2, 0)]):
        record = compared(stacks[family], PROMPTS, 24, exit_layer, draft_length, processing=WARM, seed=seed)
        kept += record.accepted
    assert len({count for length, count in kept if length == 3}) > 2
    assert record.tokens != decode(stacks[family], PROMPTS, 24).tokens, "it did not decode greedily"


@pytest.mark.parametrize("family", MIXED if FULL else MIXED[:1])
@pytest.mark.parametrize("processing", [Processing(), WARM], ids=["greedy", "sampled"])
def test_drafts_that_stop_at_low_confidence_stop_at_the_same_place(stacks, family, processing):
    lengths = Counter()
    for confidence in (0.2, 0.6, 0.9, 0.99) if FULL else (0.2, 0.9):
        record = compared(
            stacks[family], PROMPTS, 24, 2, 4, processing=processing, seed=3, confidence=confidence
        )
        lengths += Counter(len(r.draft) for rounds in record.rounds for r in rounds if r.source != "prefill")
    assert {0, 4} <= set(lengths)
    assert set(lengths) & {1, 2, 3}, "some stopped on the way"


@pytest.mark.parametrize("sampled", [False, True])
def test_early_exit_decoding_on_the_device_stops_at_the_exit(stacks, sampled):
    processing = WARM if sampled else Processing()
    record = compared(stacks["llama"], PROMPTS, 16, 2, unverified=True, processing=processing)
    assert {round.source for rounds in record.rounds for round in rounds[1:]} == {"early-exit"}
    assert {round.layer_passes for rounds in record.rounds for round in rounds[1:]} == {2}


@pytest.mark.parametrize("family", MIXED if FULL else MIXED[:1])
def test_an_end_of_sequence_at_every_draft_offset_cuts_what_the_device_drafted(stacks, family):
    plain, offsets, rejected = decode(stacks[family], PROMPTS, 48).tokens, Counter(), 0
    for token in dict.fromkeys(itertools.chain(*plain)):
        record = compared(stacks[family], PROMPTS, 48, 2, 3, eos=frozenset([token]))
        offsets += record.eos_offsets
        rejected += record.rejected_eos
        if set(offsets) == {0, 1, 2} and rejected:
            return
    pytest.fail(f"EOS offsets seen: {sorted(offsets)}, rejected: {rejected}")


def test_a_sampled_end_of_sequence_ends_the_row_on_both_paths(stacks):
    offsets, rejected = Counter(), 0
    for seed in range(12):
        eos = frozenset(range(2, 64, 5))
        record = compared(stacks["llama"], PROMPTS, 32, 2, 3, eos=eos, processing=WARM, seed=seed)
        offsets += record.eos_offsets
        rejected += record.rejected_eos
    assert set(offsets) == {0, 1, 2}
    assert rejected


@pytest.mark.parametrize("processing", [Processing(), WARM], ids=["greedy", "sampled"])
def test_budgets_shorter_than_a_draft_are_masks(stacks, processing):
    for new in (1, 2, 3, 5, 9):
        record = compared(stacks["gpt2"], PROMPTS, new, 4, 8, processing=processing)
        assert [len(tokens) for tokens in record.tokens] == [new] * 3


@pytest.mark.parametrize(
    ("family", "draft_length", "capacity"), matrix(MIXED, (0, 3, 8), (11, 12, 14, 19, tiny.CONTEXT))
)
def test_a_full_cache_ends_the_row_and_nothing_is_written_behind_it(stacks, family, draft_length, capacity):
    positions_end = capacity == tiny.CONTEXT  # where the cache ends
    prompts = [[3] * (capacity - 6)] if positions_end else PROMPTS
    record = compared(stacks[family], prompts, 30, 2, draft_length, capacity=capacity)
    assert [len(tokens) for tokens in record.tokens] == [capacity - len(prompt) + 1 for prompt in prompts]


@pytest.mark.parametrize(
    ("family", "rows"), matrix(MIXED, (2, 3, 5)) if FULL else [*zip(MIXED, (2, 3, 5, 3, 2), strict=True)]
)
def test_rows_that_join_and_leave_keep_their_tokens(stacks, family, rows):
    prompts = [*PROMPTS, [3, 3, 3], [60, 2], list(range(20, 40)), [8] * 70]
    news = [4, 20, 9, 1, 14, 30, 12]
    how = {"rows": rows, "capacity": 110, "each": lambda i: {"max_new_tokens": news[i]}}
    record = compared(stacks[family], prompts, 0, 2, 3, **how)
    alone = [decode(stacks[family], [p], n, 2, 3).tokens[0] for p, n in zip(prompts, news, strict=True)]
    assert record.tokens == alone


def test_rows_of_other_laws_and_draft_lengths_share_an_engine(stacks):
    """Greedy, sampled, simulated, with log-probabilities, with a penalty: each where it belongs, all as alone."""
    kinds = [
        {},
        {"processing": WARM, "seed": 3},
        {"logprobs": True},
        {"processing": Processing(Sampling(temperature=0.7, repetition_penalty=1.3))},
        {"draft_length": 1},
        {"exit_layer": 4},
        {"processing": Processing(Sampling(temperature=0.5))},
        {"simulated": 0.6},
    ]
    laws = [device_law(Request([1], 1, **kind)) for kind in kinds]
    assert [law is None for law in laws] == [False, False, True, True, False, False, False, False]
    each = [{"exit_layer": 2, "draft_length": 3, **kind} for kind in kinds]
    prompts = [[5 + i, 9, 20 + i] for i in range(len(kinds))]
    record = compared(stacks["llama"], prompts, 20, each=lambda index: each[index])
    assert record.engine.device_rounds.graphs.replays > 0
    given = [x for round in record.rounds[2] for x in round.logprobs]
    alone = decode(stacks["llama"], prompts[2:3], 20, logprobs=True).rounds[0]
    wanted = torch.tensor([x for round in alone for x in round.logprobs])
    torch.testing.assert_close(torch.tensor(given), wanted, rtol=0, atol=CLOSE[torch.float32])


def test_simulated_acceptance_keeps_by_chance_and_counts_like_the_host(stacks):
    for chance in (0.0, 0.5, 1.0):
        record = compared(stacks["llama"], PROMPTS, 48, 2, 4, simulated=chance, seed=5)
        assert abs(record.acceptance - {0.0: 0.0, 0.5: 0.24, 1.0: 1.0}[chance]) < 0.15


@pytest.mark.parametrize("processing", [Processing(), WARM], ids=["greedy", "sampled"])
def test_a_reduced_draft_head_drafts_from_its_subset_on_the_device(stacks, processing):
    head = stacks["llama"].reduced_head(range(0, tiny.VOCAB, 2))
    record = compared(stacks["llama"], PROMPTS, 32, 4, 3, draft_head=head, processing=processing)
    drafts = {token for rounds in record.rounds for round in rounds for token in round.draft}
    assert drafts <= set(head.ids.tolist())
    assert {token for tokens in record.tokens for token in tokens} - drafts


def drained(engine):
    rounds = []
    while engine.busy:
        rounds += engine.step()
    return rounds


def test_a_kept_row_goes_on_with_its_cache(stacks):
    """A chat: the second turn reuses what the device wrote, and only that."""
    answers = []
    for on_device in (False, True):
        engine = Engine(stacks["llama"], rows=3, capacity=128, device_rounds=on_device)
        row = engine.add(Request(PROMPTS[0], 7, 2, 4, keep=True))
        drained(engine)
        longer = [*engine.tokens(row), 3, 4, 5]
        engine.add(Request(longer, 9, 2, 4, keep=True), row)
        other = engine.add(Request(PROMPTS[1], 30, 2, 4, index=1))
        rounds = drained(engine)
        assert next(r for r in rounds if r.row == row).prompt_tokens == 4
        answers.append([[t for r in rounds if r.row == at for t in r.tokens] for at in (row, other)])
    assert answers[0] == answers[1]
    assert answers[0][0] == decode(stacks["llama"], [longer], 9).tokens[0]


@pytest.mark.parametrize("family", MIXED)
def test_the_cache_after_every_round_equals_a_fresh_prefill_of_the_kept_tokens(stacks, family):
    stack, checked = stacks[family], 0
    engine = Engine(stack, rows=4, capacity=40, device_rounds=True)
    rows = [engine.add(Request(prompt, 12, 2, 3, index=i)) for i, prompt in enumerate(PROMPTS)]
    lengths = {row: len(prompt) for row, prompt in zip(rows, PROMPTS, strict=True)}
    while engine.busy:
        engine.step()
        for row in list(engine._rows):
            tokens, length = engine.tokens(row), engine.cache.lengths[row]
            if length < lengths[row]:
                continue
            assert length == len(tokens) - 1
            fresh = Engine(stack, rows=1, capacity=40)
            fresh.add(Request(tokens[:-1], 1, keep=True))
            fresh.step()
            for ours, theirs in zip(
                engine.cache.keys + engine.cache.values, fresh.cache.keys + fresh.cache.values, strict=True
            ):
                close = CLOSE[torch.float32] * max(1.0, theirs.abs().max().item())
                torch.testing.assert_close(ours[row, :, :length], theirs[0, :, :length], rtol=0, atol=close)
            checked += 1
    assert checked > 10
    while engine.cache.allocate() is not None:
        pass
    for tensor in (*engine.cache.keys, *engine.cache.values):
        assert not tensor[:, :, : engine.cache.capacity].any(), (
            "freed rows are clean when given out, and dead ones wrote to spill slots only"
        )


@pytest.mark.parametrize("exit_layer", [1, 2])
def test_nan_logits_are_the_same_error_and_the_other_rows_go_on(stacks, exit_layer):
    wanted = decode(stacks["llama"], [[7, 8]], 8).tokens[0]
    engine = Engine(stacks["llama"], rows=2, capacity=32, device_rounds=True)
    good = engine.add(Request([7, 8], 8, 2, 3))
    bad = engine.add(
        Request(PROMPTS[0], 8, exit_layer, 3, index=1)
    )  # in the group of the good row, or in another
    tokens, errors = [], []
    while not engine.cache.lengths[bad]:
        tokens += [t for round in engine.step() if round.row == good for t in round.tokens]
    with torch.inference_mode():
        engine.cache.keys[0][bad, :, :2] = torch.nan
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Failure):
                errors.append((event.row, event.error.message))
            elif event.row == good:
                tokens += event.tokens
    assert errors == [(bad, "the model gave NaN or infinite logits")]
    assert tokens == wanted
    engine.cache.allocate()
    engine.cache.allocate()
    assert not engine.cache.keys[0][bad, :, :-1].isnan().any()


@pytest.mark.parametrize("capture", [None, Replayed()], ids=["eager", "graphs"])
@pytest.mark.parametrize("draft_length", [0, 1, 3])
def test_the_work_of_a_round_is_that_of_the_method_at_full_draft_length(stacks, draft_length, capture):
    """Also in replays, where no Python runs; budgets shorten what is judged and not what is computed."""
    stack, k = stacks["llama"], draft_length
    engine = Engine(stack, rows=1, capacity=64, device_rounds=True)
    engine.device_rounds.graphs.capture = capture
    engine.add(Request(PROMPTS[0], 9, 2, k))
    engine.step()
    for _ in range(3):
        stack.counters.reset()
        [round] = engine.step()
        assert stack.counters.runs == ({(0, 2, 1): k + 1, (2, L, k + 1): 1} if k else {(0, L, 1): 1})
        assert stack.counters.head_rows == {tiny.VOCAB: k + (k + 1)}
        assert stack.counters.layer_tokens == round.layer_passes == (k + 1) * L
        if round.finish_reason:
            break


class NoSync(TorchDispatchMode):
    """Fail on what makes a device wait for the host, or the host for the device."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self, copies_in=True):
        super().__init__()
        self.forbidden = {*self.WAITS, "lift_fresh"} if copies_in else set(self.WAITS)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        assert name.split(".")[0] not in self.forbidden, func
        assert not name.startswith("where.Scalar"), "on CUDA the scalar is copied in, and waited for"
        if "index" in func.name():
            flat = [x for arg in args if isinstance(arg, (list, tuple)) for x in arg]
            assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in flat), func
        return func(*args, **(kwargs or {}))


def test_the_guard_against_synchronisation_can_fail():
    x = torch.arange(3)
    with torch.inference_mode(), NoSync():
        waiting = [
            lambda: x.sum().item(),
            lambda: bool(x[0]),
            lambda: x[x > 1],
            lambda: torch.tensor([1]),
            lambda: torch.where(x > 1, x, 0),
        ]
        for act in waiting:
            with pytest.raises(AssertionError):
                act()


CAPTURED = [*tiny.FAMILIES, *(name for name in tiny.NATIVE if name.endswith("+torch"))]
ROUNDS = matrix(CAPTURED, (Sampling(), WARM.sampling), (True, False), (L, 2), (0.0, 0.5), (False, True))


@pytest.mark.parametrize("family", CAPTURED)
def test_a_round_never_looks_at_a_number_and_brings_none_along(family):
    """Nothing inside waits, so all of it can be captured, for every family's own modules."""
    stack = tiny.stack(family)
    head = stack.reduced_head(range(20))
    with torch.inference_mode():
        cache = stack.new_cache(4, 32)
        for of, law, in_place, depth, sure, reduced in ROUNDS:
            if of != family:
                continue
            shape = Shape(2, depth, 3, law, None, sure, batch=2, kv_len=32, in_place=in_place)
            packed = torch.zeros(2, 4 + shape.num_uniforms, dtype=torch.int64)
            packed[0, :4] = torch.tensor([0 if in_place else 3, 7, 4, 4])
            packed[1, 0] = 1  # dead
            with NoSync():
                answer = device_round(stack, cache, head if reduced else None, packed, shape)
            assert answer.shape == (2, 7)


@pytest.mark.parametrize("processing", [Processing(), WARM], ids=["greedy", "sampled"])
def test_a_step_of_many_rows_fetches_once(stacks, monkeypatch, processing):
    fetches = []
    original = device_rounds.fetched
    monkeypatch.setattr(device_rounds, "fetched", lambda t: fetches.append(t.shape) or original(t))
    engine = Engine(stacks["llama"], rows=3, capacity=64, device_rounds=True)
    for index, prompt in enumerate(PROMPTS):
        engine.add(Request(prompt, 20, 2, 3, index=index, processing=processing))
    while any(engine._prefilling(row) for row in engine._rows.values()):
        engine.step()
    fetches.clear()
    with NoSync(copies_in=False):
        for done in range(1, 4):
            engine.step()
            assert len(fetches) == done
    assert set(fetches) == {(3, 7)}


def test_running_a_round_twice_is_running_it_once(stacks):
    """Capturing relies on it: the trial run works on real numbers."""
    stack = stacks["qwen2"]
    shape = Shape(2, L, 3, WARM.sampling, None, 0.0, batch=1, kv_len=32, in_place=True)
    packed = torch.zeros(1, 4 + shape.num_uniforms, dtype=torch.int64)
    packed[0, :4] = torch.tensor([0, 7, 0, 4])
    with torch.inference_mode():
        cache = stack.new_cache(1, 32)
        first = device_round(stack, cache, None, packed, shape)
        keys = [key.clone() for key in cache.keys]
        assert torch.equal(device_round(stack, cache, None, packed, shape), first)
        assert all(torch.equal(a, b) for a, b in zip(keys, cache.keys, strict=True))


def test_a_step_laid_out_on_the_device_is_the_step_laid_out_on_the_host():
    rows, starts, counts = [2, 0, 1], [5, 0, 9], [3, 1, 0]
    host = Step.span(rows, starts, counts, torch.device("cpu"), spill=16)
    index, first, live = (torch.tensor(x) for x in (rows, starts, counts))
    ours = Step.on_device(index, first, live, torch.arange(3), kv_len=16, spill=16, in_place=False)
    assert torch.equal(ours.positions, host.positions)
    assert torch.equal(ours.slots, host.slots)
    assert (ours.row_slice, ours.uniform, ours.width) == (None, False, 3)
    for window in (None, 4):
        assert torch.equal(ours.mask(window)[..., : host.kv_len], host.mask(window))
        assert not ours.sees_everything(window)
        assert not ours.from_empty(window)


def test_rows_far_apart_are_gathered_and_near_ones_read_in_place(stacks):
    engine = Engine(stacks["llama"], rows=8, capacity=100, device_rounds=True)
    for index in range(8):
        engine.add(Request([5, index + 2], 90, 2, 3, index=index))
    for _ in range(8 + 7):  # prompts and rounds alternate
        engine.step()
    seen = []
    for cancelled, wanted in (((), (8, True)), ((2, 3, 4, 5, 6), (4, False)), ((1, 7), (1, True))):
        for row in cancelled:
            engine.cancel(row)
        shape, places, packed = engine.device_rounds._layout(list(engine._rows.values()), None)
        assert (shape.batch, shape.in_place) == wanted
        assert packed.shape == (shape.batch, 4)
        alive = [
            row for row, count in zip(packed[:, 0].tolist(), packed[:, 3].tolist(), strict=True) if count
        ]
        assert sorted(alive) == sorted(engine._rows)
        seen.append(places)
    assert seen == [list(range(8)), [0, 1, 2], [0]]


def test_the_device_path_is_off_where_there_is_no_cuda_device_and_never_by_surprise(stacks):
    assert Engine(stacks["llama"], rows=1, capacity=8).device_rounds is None
    assert (
        Engine(stacks["llama"], rows=1, capacity=8, device_rounds=True).device_rounds.graphs.capture is None
    )
