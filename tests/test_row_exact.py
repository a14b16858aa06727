"""On the CPU the native stack gives a token the same bits alone and in company, so 16-bit output is exact too."""

import copy
import functools
import itertools

import pytest
import torch

import tiny
from conftest import FULL
from layerskip.decode.sampling import Processing, Sampling
from layerskip.model.native.bfloat16 import compiles_bfloat16
from layerskip.model.native.formats import FORMATS
from layerskip.model.native.linear import packs
from layerskip.model.native.load import FAMILIES
from layerskip.model.native.stack import NativeStack
from layerskip.model.step import Step
from pairwise import matrix
from rounds import decode

pytestmark = pytest.mark.matrix
CPU, L = torch.device("cpu"), tiny.NUM_LAYERS
PROMPTS = [[5, 9, 20, 33], list(range(7, 18)), [40]]
KINDS = ((torch.float32, None), (torch.bfloat16, None), *((torch.bfloat16, name) for name in FORMATS))
COMPILED = (True, False)
NEW = 48 if FULL else 24


def named(cells):
    """Parametrisations with readable names."""
    return [pytest.param(*cell, id="-".join(map(str, cell)).replace("torch.", "")) for cell in cells]


@functools.cache
def stack_of(family, dtype, quantize, compiled):
    ours = quantize is not None or (dtype == torch.bfloat16 and compiled and compiles_bfloat16())
    if not ours and not packs(dtype, CPU):
        pytest.skip(f"oneDNN does not multiply {dtype} natively on this processor")
    return NativeStack(copy.deepcopy(tiny.calibrated(family)).to(dtype), quantize=quantize, compiled=compiled)


@functools.cache
def plain(*kind):
    """What plain decoding of one prompt at a time gives."""
    return [decode(stack_of(*kind), [prompt], NEW).tokens[0] for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("family", "kind", "compiled", "draft", "rows"),
    named(matrix(FAMILIES, KINDS, COMPILED, ((1, 3), (2, 8), (L - 1, 1)), (1, 3))),
)
def test_self_speculation_equals_plain_decoding_in_every_dtype(family, kind, compiled, draft, rows):
    """Bits of near ties included: plain decoding one token at a time, verification of 2 to 9, batches of 3."""
    stack = stack_of(family, *kind, compiled)
    assert stack.row_exact
    alone = plain(family, *kind, compiled)
    assert decode(stack, PROMPTS[:rows], NEW).tokens == alone[:rows]
    assert decode(stack, PROMPTS[:rows], NEW, *draft).tokens == alone[:rows]


@pytest.mark.parametrize(
    ("family", "kind", "compiled"), named(itertools.product(["llama", "qwen2"], KINDS, COMPILED))
)
def test_logits_are_equal_to_the_last_bit_however_many_positions_a_call_has(family, kind, compiled):
    stack = stack_of(family, *kind, compiled)
    tokens = torch.randint(2, tiny.VOCAB, (1, 120), generator=torch.Generator().manual_seed(1))

    def logits(chunks):
        cache, found, start = stack.new_cache(1, 120), [], 0
        for count in chunks:
            step = Step.span([0], [start], [count], CPU, spill=120)
            with torch.inference_mode():
                h, _ = stack.run(stack.embed(tokens[:, start : start + count], step), 0, L, step, cache)
                found.append(stack.logits(h)[0])
            start += count
        return torch.cat(found)

    alone = logits([1] * 120)
    for chunks in ([2] * 60, [9] * 13 + [3], [4, 13, 32, 31, 1, 17, 22]):
        assert torch.equal(logits(chunks), alone), chunks


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
def test_a_draft_vocabulary_stays_exact_in_bfloat16_when_the_target_leaves_it(compiled):
    stack = stack_of("llama", torch.bfloat16, None, compiled)
    plain = decode(stack, PROMPTS, 48)
    wanted = {token for tokens in plain.tokens for token in tokens}
    inside = sorted(wanted)[::2]
    assert wanted - set(inside), "the target does leave the subset"
    record = decode(stack, PROMPTS, 48, 2, 4, draft_head=stack.reduced_head(inside))
    assert record.tokens == plain.tokens
    assert {token for rounds in record.rounds for r in rounds for token in r.draft} <= set(inside)


def test_sampling_repeats_per_seed_in_any_company():
    stack = stack_of("llama", torch.bfloat16, None, True)
    processing = Processing(Sampling(temperature=0.9, top_p=0.95))
    together = decode(stack, PROMPTS, 24, 2, 3, processing=processing, seed=7)
    again = decode(stack, PROMPTS, 24, 2, 3, rows=1, processing=processing, seed=7)
    assert together.tokens == again.tokens
