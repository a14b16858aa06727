"""The promise: self-speculative output is that of plain decoding, which is that of Hugging Face `generate`."""

import functools
import itertools
from collections import Counter

import pytest
import torch

import tiny
from conftest import FULL
from pairwise import matrix
from rounds import decode

pytestmark = pytest.mark.matrix
NEW = 48 if FULL else 24
PROMPTS = [[5, 9, 20, 33], list(range(7, 18)), [40]]  # ragged; one of a single token
EXITS = (1, 2, tiny.NUM_LAYERS - 1)
DRAFTS = (0, 1, 3, 8)
ROWS = (1, 3)
DTYPES = (torch.float32, torch.float64)


MIXED = ["llama", "llama+native", "llama+torch", "gemma2", "opt"]  # windows, soft-caps, learned positions
CELLS = matrix(tiny.STACKS, DTYPES, EXITS, DRAFTS, ROWS)


@functools.cache
def reference(family, dtype):
    """What Hugging Face `generate` says, prompt by prompt."""
    family, _, kind = family.partition("+")
    if kind:
        return reference(family, dtype)
    model, outputs = tiny.calibrated(family, dtype), []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


@functools.cache
def stack_of(family, dtype):
    return tiny.stack(family, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", tiny.STACKS)
def test_greedy_self_speculation_equals_plain_decoding_equals_hugging_face(family, dtype):
    stack, expected = stack_of(family, dtype), reference(family, dtype)
    if FULL or dtype == torch.float32:  # a draft length of 0 is plain decoding too
        assert decode(stack, PROMPTS, NEW).tokens == expected, "plain decoding"
    for *of, exit_layer, draft_length, rows in CELLS:
        if of == [family, dtype]:
            prompts, wanted = (PROMPTS, expected) if rows == 3 else (PROMPTS[1:2], expected[1:2])
            record = decode(stack, prompts, NEW, exit_layer, draft_length)
            assert record.tokens == wanted, (exit_layer, draft_length, rows)


@pytest.mark.parametrize("family", tiny.STACKS if FULL else MIXED)
def test_an_end_of_sequence_at_any_draft_offset_ends_the_output_there(family):
    dtype = torch.float32
    stack, expected = stack_of(family, dtype), reference(family, dtype)
    offsets, rejected, draft_length = Counter(), 0, 3
    for token in dict.fromkeys(itertools.chain(*expected)):
        wanted = [tokens[: tokens.index(token) + 1] if token in tokens else tokens for tokens in expected]
        record = decode(stack, PROMPTS, NEW, 2, draft_length, eos=frozenset([token]))
        assert record.tokens == wanted, token
        for rounds, tokens in zip(record.rounds, wanted, strict=True):
            assert rounds[-1].finish_reason == ("eos" if tokens[-1] == token else "length")
        offsets += record.eos_offsets
        rejected += record.rejected_eos
        if not FULL and set(offsets) == set(range(draft_length)) and rejected:
            break
    assert set(offsets) == set(range(draft_length)), "an accepted EOS occurred at every draft offset"
    assert rejected, "an EOS was drafted and rejected, and did not stop the row"


def test_every_accepted_count_of_a_long_draft_occurs():
    stack = stack_of("llama", torch.float32)
    seen: Counter = Counter()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(2, tiny.VOCAB, (3, 6), generator=generator).tolist()
        record = decode(stack, prompts, NEW, 2, 8)
        assert record.tokens == decode(stack, prompts, NEW).tokens
        seen += record.accepted
        if set(seen) == {(8, count) for count in range(9)}:
            return
    pytest.fail(f"never saw {[count for count in range(9) if (8, count) not in seen]} of 8 drafts kept")


def test_an_end_of_sequence_at_every_offset_of_a_long_draft():
    stack, expected = stack_of("gpt_neox", torch.float32), reference("gpt_neox", torch.float32)
    offsets = Counter()
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(2, tiny.VOCAB, (1, 5), generator=generator).tolist()
        plain = decode(stack, prompt, NEW).tokens[0]
        for token in dict.fromkeys(plain):
            record = decode(stack, prompt, NEW, 2, 8, eos=frozenset([token]))
            assert record.tokens[0] == plain[: plain.index(token) + 1]
            offsets += record.eos_offsets
        if set(offsets) == set(range(8)):
            return
    pytest.fail(f"EOS offsets seen: {sorted(offsets)}; {expected}")


def test_all_end_of_sequence_ids_count_and_the_earliest_wins():
    stack, expected = stack_of("llama", torch.float32), reference("llama", torch.float32)
    early, late = expected[0][4], expected[0][9]
    wanted = expected[0][: min(expected[0].index(early), expected[0].index(late)) + 1]
    for ids in ([early, late], [late, early]):
        record = decode(stack, PROMPTS[:1], NEW, 2, 8, eos=frozenset(ids))
        assert record.tokens[0] == wanted


@pytest.mark.parametrize("family", MIXED)
def test_chunked_prefill_changes_nothing(family):
    stack, expected = stack_of(family, torch.float32), reference(family, torch.float32)
    for chunk in (1, 3, 4):
        assert decode(stack, PROMPTS, NEW, 2, 3, prefill_chunk=chunk).tokens == expected


@pytest.mark.parametrize("family", tiny.STACKS)
def test_a_row_gives_the_same_tokens_in_any_company(family):
    """Rows join and leave: six prompts through two rows, against each alone. Drafts are kept, cut and lost."""
    stack = stack_of(family, torch.float32)
    prompts = [*PROMPTS, [3, 3, 3], [60, 2], list(range(20, 40))]
    together = decode(stack, prompts, 20, 2, 3, rows=2)
    assert {count for length, count in together.accepted if length == 3} == {0, 1, 2, 3}
    assert 0.3 < together.acceptance < 0.8, "the models are calibrated so that drafts are kept and lost"
    alone = [tokens[:20] for tokens in reference(family, torch.float32)]
    alone += [decode(stack, [prompt], 20, 2, 3).tokens[0] for prompt in prompts[len(PROMPTS) :]]
    assert together.tokens == alone


def test_early_exit_decoding_equals_a_model_cut_after_the_exit():
    model, exit_layer = tiny.calibrated("llama"), 2
    cut = tiny.config_of("llama", num_hidden_layers=exit_layer)
    small = type(model)(cut).eval()
    small.load_state_dict(model.state_dict(), strict=False)
    ids = torch.tensor([PROMPTS[1]])
    wanted = small.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    record = decode(stack_of("llama", torch.float32), PROMPTS[1:2], 20, exit_layer, unverified=True)
    assert record.tokens[0] == wanted[0, len(PROMPTS[1]) :].tolist()
    assert {round.source for round in record.rounds[0]} == {"prefill", "early-exit"}
