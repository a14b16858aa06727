"""Logits processors: those with a state forget rejected drafts, and speculation changes nothing under any."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers as hf

import tiny
from layerskip.decode.engine import Engine
from layerskip.decode.request import Request, Round
from layerskip.decode.sampling import Processing, Sampling
from layerskip.errors import UserError
from layerskip.model.huggingface import HuggingFaceStack

VOCAB = 8
GREEDY = Sampling()


class ForbidByCall:
    """Forbid token n at the n-th call: its state is the number of calls. Writes in place, as some do."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.calls % scores.shape[-1]] = -torch.inf
        self.calls += 1
        return scores


class Recorder:
    """Remember the ids it was shown."""

    def __init__(self) -> None:
        self.shown: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.shown.append(input_ids[0].tolist())
        return scores


class Locked(ForbidByCall):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_a_rejected_draft_leaves_no_trace_in_a_stateful_processor():
    original = ForbidByCall()
    processing = Processing(GREEDY, (original,))
    logits, start = torch.zeros(VOCAB), processing.processors
    for _ in range(2):  # the second branch begins where the first began
        state = start
        for n in range(3):
            shaped, state = processing.law_logits(logits, [1] * (n + 1), state)
            assert shaped.isinf().nonzero().flatten().tolist() == [n]
            assert state[0].calls == n + 1
    assert original.calls == 0
    assert not logits.any()


def test_pure_processors_of_transformers_are_shared_not_copied():
    processor = hf.NoRepeatNGramLogitsProcessor(2)
    _, state = Processing(GREEDY, (processor,)).law_logits(torch.zeros(VOCAB), [1, 2, 1], (processor,))
    assert state == (processor,)


def test_processors_run_in_order_after_the_penalty_and_see_the_padded_prefix():
    class Add:
        def __call__(self, input_ids, scores):
            return scores + 1

    class Double:
        def __call__(self, input_ids, scores):
            return scores * 2

    processing = Processing(Sampling(repetition_penalty=4.0), (Recorder(), Add(), Double()), padding=(0, 0))
    shaped, state = processing.law_logits(torch.full((VOCAB,), 2.0), [3, 5], processing.processors)
    assert shaped.tolist() == [3.0 if token in (3, 5) else 6.0 for token in range(VOCAB)]
    assert state[0].shown == [[0, 0, 3, 5]]


def test_a_processor_that_cannot_be_copied_is_refused_by_name():
    with pytest.raises(UserError, match="Locked keeps state that cannot be copied"):
        Processing(GREEDY, (Locked(),))


def test_guidance_is_refused():
    model = tiny.random_model("llama")
    for processor in (
        hf.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model),
        hf.ClassifierFreeGuidanceLogitsProcessor(1.5),
    ):
        with pytest.raises(UserError, match=f"^{type(processor).__name__} cannot be used"):
            Processing(GREEDY, (processor,))


def test_processors_that_forbid_every_token_are_reported():
    def forbid_all(input_ids, scores):
        return torch.full_like(scores, -torch.inf)

    with pytest.raises(UserError, match="forbid every token"):
        Processing(GREEDY, (forbid_all,)).law_logits(torch.zeros(VOCAB), [1], (forbid_all,))


# -- in the engine: speculation changes nothing --------------------------------------------------------------

EOS = 5


@pytest.fixture(scope="module")
def stack():
    model = tiny.random_model(
        "llama", seed=6, vocab_size=VOCAB, num_hidden_layers=3, hidden_size=16, intermediate_size=16
    )
    return HuggingFaceStack(model)


def rounds(stack, processing: Processing, draft_length: int, draft_ids=None, **request) -> list[Round]:
    head = stack.reduced_head(draft_ids) if draft_ids else None
    engine = Engine(stack, rows=1, capacity=64, draft_head=head)
    early = {"exit_layer": 2, "draft_length": draft_length} if draft_length else {}
    engine.add(Request([1, 2], **{"max_new_tokens": 24, **request}, processing=processing, **early))
    done = []
    while engine.busy:
        done += engine.step()
    return done


def generated(stack, processing: Processing, draft_length: int, draft_ids=None, **request) -> list[int]:
    done = rounds(stack, processing, draft_length, draft_ids, **request)
    return [token for round in done for token in round.tokens]


def synth_id() -> hf.SynthIDTextWatermarkLogitsProcessor:
    return hf.SynthIDTextWatermarkLogitsProcessor(
        ngram_len=3, keys=[3, 14, 15, 92], sampling_table_size=64, sampling_table_seed=0,
        context_history_size=16, device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "processor",
    [
        ForbidByCall,
        synth_id,
        lambda: hf.NoRepeatNGramLogitsProcessor(2),
        lambda: hf.MinLengthLogitsProcessor(9, EOS),
    ],
    ids=["own state", "SynthID", "no repeated pairs", "minimum length"],
)
def test_greedy_speculation_equals_plain_decoding_under_a_processor(stack, processor):
    """The same processor object serves both runs: neither may leave state in it."""
    processing = Processing(Sampling(repetition_penalty=1.2), (processor(),))
    plain = generated(stack, processing, 0)
    assert len(plain) == 24
    for draft_length in (1, 2, 4):
        done = rounds(stack, processing, draft_length)
        assert [token for round in done for token in round.tokens] == plain
        assert 0 < sum(round.accepted for round in done) < sum(round.drafted for round in done)
    assert generated(stack, processing, 0) == plain


@pytest.mark.parametrize("shape", [Sampling(1.0), Sampling(0.8, top_k=5, top_p=0.9, repetition_penalty=1.5)])
def test_a_draft_model_that_equals_the_target_has_every_draft_kept(shape):
    """Both sides are shaped and processed alike, on the same prefixes: layers above the exit do nothing here."""
    model = tiny.random_model("llama", seed=6, vocab_size=VOCAB, num_hidden_layers=3)
    with torch.no_grad():
        for branch in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            branch.weight.zero_()
    same = HuggingFaceStack(model)
    processing = Processing(shape, (ForbidByCall(), hf.NoRepeatNGramLogitsProcessor(3)))
    for seed in range(4):
        done = rounds(same, processing, 4, seed=seed)
        assert sum(round.drafted for round in done) == sum(round.accepted for round in done) > 12


class EndsForGood:
    """A grammar: nothing may follow the end of the sequence."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf) if EOS in input_ids[0] else scores


def test_a_grammar_that_forbids_everything_after_the_end_is_never_asked_there(stack):
    """Plain decoding stops at EOS; verification computed the law of the position after a drafted one."""
    for seed in range(12):
        tokens = generated(
            stack, Processing(Sampling(temperature=1.0), (EndsForGood(),)), 3, eos=frozenset([EOS]), seed=seed
        )
        assert EOS not in tokens[:-1]


def test_a_constraint_outside_the_draft_vocabulary_does_not_stop_decoding(stack):
    """The target can satisfy it although no draft can: such a round has no drafts."""

    def only_six(input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_copy_(-1, torch.tensor([6]), scores[:, 6:7])

    processing = Processing(GREEDY, (only_six,))
    assert generated(stack, processing, 0, max_new_tokens=4) == [6] * 4
    assert generated(stack, processing, 2, draft_ids=[0, 1, 2], max_new_tokens=4) == [6] * 4


def test_a_dead_end_behind_a_rejected_draft_does_not_stop_decoding(stack):
    """A processor with no token left after some prefix matters only where that prefix is committed."""
    plain = generated(stack, Processing(), 0)

    class DeadEndOffThePath:
        def __call__(self, input_ids, scores):
            new = input_ids[0, 2:].tolist()
            return scores if new == plain[: len(new)] else torch.full_like(scores, -torch.inf)

    processing = Processing(GREEDY, (DeadEndOffThePath(),))
    assert generated(stack, processing, 0) == plain
    assert generated(stack, processing, 3) == plain
