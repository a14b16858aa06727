"""Where implementations stop being lossless: one named test per trap.

Each trap is a mistake found in published code. Trap 1 (16-bit kernels) and the built-in model are at the end.
"""

import pytest
import torch
from transformers import LogitsProcessor, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

import tiny
from layerskip.checkpoint import resolve as hub
from layerskip.decode import sampling
from layerskip.decode.engine import Engine
from layerskip.decode.request import Failure, Request
from layerskip.decode.sampling import Processing, Sampling
from layerskip.errors import UserError
from layerskip.model.huggingface import HuggingFaceStack
from layerskip.model.step import Step
from rounds import decode

L = tiny.NUM_LAYERS
PROMPT = [5, 9, 20, 33]


@pytest.fixture
def stack(llama):
    return llama[1]


def test_trap_2_the_last_draft_passes_the_early_layers_and_slots_stay_aligned(stack):
    """Its keys would be missing in the early layers after full acceptance: the next round would see a hole."""
    engine = Engine(stack, rows=1, capacity=64)
    engine.add(Request(PROMPT, 40, 4, 3))
    full = 0
    while engine.busy:
        full += any(round.accepted == 3 for round in engine.step())
        early, late = engine.cache.keys[0][0], engine.cache.keys[-1][0]
        length = engine.cache.lengths[0]
        assert early[:, :length].abs().sum(-1).gt(0).all()
        assert late[:, :length].abs().sum(-1).gt(0).all()
    assert full, "a fully accepted draft occurred"


def test_trap_2_a_sliding_window_still_sees_what_a_rollback_needs():
    """Windows of 6 with drafts of 8: an evicting cache would have lost the slots a rejection goes back to."""
    for family in ("mistral", "mistral+native", "mistral+torch", "gemma3_text"):
        stack = tiny.stack(family)
        plain = decode(stack, [PROMPT], 48).tokens
        assert decode(stack, [PROMPT], 48, 1, 8).tokens == plain


def test_trap_3_nothing_after_an_accepted_end_of_sequence_is_committed_or_counted(stack):
    plain = decode(stack, [PROMPT], 30).tokens[0]
    for token in dict.fromkeys(plain[1:]):
        record = decode(stack, [PROMPT], 30, 4, 8, eos=frozenset([token]))
        last = record.rounds[0][-1]
        assert record.tokens[0] == plain[: plain.index(token) + 1]
        assert last.drafted >= last.accepted
        if last.accepted == len(last.tokens):  # ended inside the draft: the rest is no rejection
            assert last.drafted == last.accepted


def test_trap_4_budget_of_one_is_a_plain_step(stack):
    record = decode(stack, [PROMPT], 1, 2, 8)
    assert len(record.tokens[0]) == 1
    assert len(record.rounds[0]) == 1
    record = decode(stack, [PROMPT], 2, 2, 8)
    assert [len(round.draft) for round in record.rounds[0]] == [0, 0]
    assert len(record.tokens[0]) == 2


def test_trap_4_no_draft_exceeds_the_budget(stack):
    for new in range(1, 12):
        record = decode(stack, [PROMPT], new, 4, 8)
        assert len(record.tokens[0]) == new
        assert record.rounds[0][-1].finish_reason == "length"


@pytest.mark.parametrize("draft_length", [0, 3, 8])
def test_trap_4_a_full_cache_ends_the_row_without_overflow(stack, draft_length):
    plain = decode(stack, [PROMPT], 30).tokens[0]
    for capacity in (4, 5, 9, 13):
        record = decode(stack, [PROMPT], 30, 2, draft_length, capacity=capacity)
        assert record.tokens[0] == plain[: capacity - len(PROMPT) + 1]
        assert record.rounds[0][-1].finish_reason == "length"


def test_trap_4_a_ragged_batch_near_capacity_does_not_write_into_its_neighbours(stack):
    prompts = [[5] * 20, [7, 8, 9]]
    together = decode(stack, prompts, 12, 4, 8, capacity=22)
    assert together.tokens == [decode(stack, [p], 12, capacity=22).tokens[0] for p in prompts]


def test_trap_4_acceptance_of_nothing_is_undefined_not_a_crash(stack):
    from layerskip.decode.generation import statistics
    from layerskip.decode.options import Plan

    record = decode(stack, [PROMPT], 1)
    stats = statistics(record.rounds[0], Plan("ar", L, 0), len(PROMPT))
    assert (stats["acceptance"], stats["tokens_per_round"], stats["decode_tokens_per_s"]) == (
        None,
        None,
        None,
    )


def test_trap_5_a_stop_is_asked_after_each_committed_token_and_cuts_a_round(stack):
    plain = decode(stack, [PROMPT], 30).tokens[0]
    for length in range(1, 12):
        asked = []

        def stop(token, asked=asked, length=length):
            asked.append(token)
            return len(asked) == length

        record = decode(stack, [PROMPT], 30, 4, 8, stop=stop)
        assert record.tokens[0] == asked == plain[:length]
        assert record.rounds[0][-1].finish_reason == "stop"


@pytest.mark.parametrize(
    "processors",
    [
        (RepetitionPenaltyLogitsProcessor(1.5),),
        (NoRepeatNGramLogitsProcessor(2),),
        (RepetitionPenaltyLogitsProcessor(1.3), NoRepeatNGramLogitsProcessor(3)),
    ],
    ids=["penalty", "ngram", "both"],
)
def test_trap_6_processors_with_history_see_the_prefix_of_each_position(llama, processors):
    model, stack = llama
    ids = torch.tensor([PROMPT])
    wanted = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=30,
        do_sample=False,
        logits_processor=list(processors),
    )[0, 4:].tolist()
    processing = Processing(Sampling(), processors)
    assert wanted != decode(stack, [PROMPT], 30).tokens[0], "the processors matter here"
    assert decode(stack, [PROMPT], 30, processing=processing).tokens[0] == wanted
    for exit_layer, draft_length in ((1, 3), (4, 8)):
        assert (
            decode(stack, [PROMPT], 30, exit_layer, draft_length, processing=processing).tokens[0] == wanted
        )


class EveryThird(LogitsProcessor):
    """A state machine: counts its calls, and at every third one forbids what it forbade least."""

    def __init__(self):
        self.calls, self.forbidden = 0, 3

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls % 3 == 0:
            self.forbidden = (self.forbidden * 7 + 1) % tiny.VOCAB
            scores[:, : self.forbidden] = -torch.inf
        return scores


def test_trap_6_a_processor_with_state_forgets_rejected_drafts(stack):
    plain = decode(stack, [PROMPT], 30, processing=Processing(Sampling(), (EveryThird(),))).tokens
    processor = EveryThird()
    assert decode(stack, [PROMPT], 30, 4, 5, processing=Processing(Sampling(), (processor,))).tokens == plain
    assert processor.calls == 0, "the caller's object is never touched"


class Locked(LogitsProcessor):
    def __init__(self):
        self.handle = (x for x in ())  # generators cannot be copied

    def __call__(self, input_ids, scores):
        return scores


def test_trap_6_a_processor_whose_state_cannot_be_copied_is_refused():
    with pytest.raises(UserError, match="cannot be copied"):
        Processing(Sampling(), (Locked(),))


def test_trap_6_draft_logits_are_spread_over_the_full_vocabulary_before_processing(stack):
    """A processor that indexes token ids would otherwise touch the wrong rows of a reduced head."""
    head = stack.reduced_head(range(0, tiny.VOCAB, 2))
    processing = Processing(
        Sampling(), (NoRepeatNGramLogitsProcessor(2), RepetitionPenaltyLogitsProcessor(1.4))
    )
    plain = decode(stack, [PROMPT], 40, processing=processing).tokens
    record = decode(stack, [PROMPT], 40, 4, 3, processing=processing, draft_head=head)
    assert record.tokens == plain
    assert set(record.tokens[0]) - set(head.ids.tolist()), "tokens outside the subset were committed"
    assert record.acceptance > 0


def test_trap_7_temperature_zero_is_greedy_and_laws_are_computed_in_float32():
    half = HuggingFaceStack(tiny.random_model("llama", dtype=torch.bfloat16))
    engine = Engine(half, rows=1, capacity=32)
    engine.add(Request(PROMPT, 4, processing=Processing(Sampling(temperature=0.0))))
    assert engine.step()[0].tokens
    assert half.logits(torch.zeros(1, 32, dtype=torch.bfloat16)).dtype == torch.float32
    assert Sampling(temperature=0.0).greedy
    law = sampling.warp(torch.tensor([0.1, 3.0, 3.0]), Sampling())
    assert law.tolist() == [0.0, 1.0, 0.0]


def test_trap_7_the_same_warper_stands_on_both_sides(stack):
    """With top-k 1 both laws are one-hot, so sampling must reproduce greedy decoding exactly."""
    plain = decode(stack, [PROMPT], 30).tokens
    for shape in (Sampling(temperature=1.5, top_k=1), Sampling(temperature=0.7, top_p=1e-6)):
        assert decode(stack, [PROMPT], 30, 4, 5, processing=Processing(shape)).tokens == plain


# Trap 8 (dropping a drawn token for its own probability) and 9 (bonus only after full acceptance, no token of
# probability zero) are laws: tests/decode/test_accept.py and test_sampling.py.


def test_trap_10_a_model_in_training_mode_is_refused():
    model = tiny.random_model("llama").train()
    with pytest.raises(UserError, match="training mode"):
        HuggingFaceStack(model)


def test_trap_10_the_configuration_is_never_touched(llama):
    model, stack = llama
    before = model.config.to_dict(), model.generation_config.to_dict()
    decode(stack, [PROMPT], 8, 2, 3)
    with pytest.raises(UserError):
        decode(stack, [PROMPT], 8, L, 3)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before
    assert len(model.model.layers) == L


@pytest.mark.parametrize("family", tiny.STACKS)
def test_trap_12_an_exit_state_continues_to_the_full_model_wherever_it_is_cut(family):
    """The kept exit state stands for the early layers' work only if both sides run the very same layers."""
    stack = tiny.stack(family)
    tokens = torch.arange(2, 14)[None]
    step = Step.span([0], [0], [12], stack.device, spill=12)
    with torch.inference_mode():
        whole, _ = stack.run(stack.embed(tokens, step), 0, L, step, stack.new_cache(1, 12))
        for exit_layer in range(1, L):
            cache = stack.new_cache(1, 12)
            h, taps = stack.run(stack.embed(tokens, step), 0, exit_layer, step, cache, taps=(exit_layer,))
            assert torch.equal(taps[exit_layer], h)
            h, _ = stack.run(h, exit_layer, L, step, cache)
            assert torch.equal(h, whole)


@pytest.mark.parametrize("exit_layer", [1, 2])
def test_nan_logits_are_an_error_and_the_other_rows_go_on(llama, exit_layer):
    _, stack = llama
    wanted = decode(stack, [[7, 8]], 8).tokens[0]
    engine = Engine(stack, rows=2, capacity=32)
    good = engine.add(Request([7, 8], 8, 2, 3))
    bad = engine.add(
        Request(PROMPT, 8, exit_layer, 3, index=1)
    )  # in the group of the good row, or in another
    tokens = []
    while not engine.cache.lengths[bad]:
        tokens += [t for round in engine.step() if round.row == good for t in round.tokens]
    with torch.inference_mode():
        engine.cache.keys[0][bad, :, :2] = torch.nan
    errors = []
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
    assert not engine.cache.keys[0][bad].isnan().any(), "the freed row is clean for the next request"


def test_trap_1_in_16_bit_every_first_divergence_sits_at_a_near_tie():
    """Verification uses other kernels than one row; bfloat16 has 8 bits, so near ties may turn over."""
    model = tiny.calibrated("llama", seed=3).to(torch.bfloat16)
    stack = HuggingFaceStack(model)
    prompts = [[i, i + 1, i + 2] for i in range(2, 42, 4)]
    plain = decode(stack, prompts, 40).tokens
    speculative = decode(stack, prompts, 40, 2, 5).tokens
    exact = sum(a == b for a, b in zip(plain, speculative, strict=True))
    assert exact >= len(prompts) // 2
    for prompt, a, b in zip(prompts, plain, speculative, strict=True):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if at is not None:
            with torch.no_grad():
                top = model(torch.tensor([prompt + a[:at]])).logits[0, -1].float().topk(2).values
            assert (top[0] - top[1]).item() <= 0.05 * top[0].abs().item()


@pytest.mark.slow
@pytest.mark.model
def test_the_built_in_model_decodes_losslessly_in_float32():
    if hub.cached("smollm2-135m") is None:
        pytest.skip("the built-in model is not in the cache folder (`make demo` puts it there)")
    import layerskip

    lm = layerskip.load("smollm2-135m", dtype="float32", device="cpu")
    prompt = [{"role": "user", "content": "Name three colours."}]
    plain = lm.generate(prompt, max_new_tokens=16)
    own = lm.generate(prompt, max_new_tokens=16, mode="self-speculative", exit_layer=6, draft_length=3)
    assert own.tokens == plain.tokens
