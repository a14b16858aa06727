"""Drafts of a round in one call: those of the adapter step by step, up to rounding, whatever stands in the call."""

from dataclasses import replace

import pytest
import torch
from test_adapter import head_of
from test_adapter import weights as adapter_weights

import tiny
from layerskip.decode.control import Choice, Controller, Prices
from layerskip.model.cost import RowCosts
from layerskip.model.native import kernels as compiled
from layerskip.model.native.stack import NativeStack
from layerskip.model.step import Step
from rounds import decode

found = compiled.kernels()
pytestmark = pytest.mark.skipif(found is None, reason="no C++ compiler")
ROUNDING = 0.05  # of the spread of the logits: products of 8 bits behind states rounded in another order
STEPS = 4


def made(family="llama", blocks=1, exit_layer=0, size=50, **changes):
    stack = NativeStack(tiny.random_model(family, dtype=torch.bfloat16, **changes))
    return stack, head_of(stack, exit_layer, size=size, blocks=blocks)


def known(stack, rows):
    return torch.randn(rows, stack.width, generator=torch.Generator().manual_seed(1)).bfloat16()


@torch.inference_mode()
@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_each_draft_is_the_best_of_the_head_behind_the_adapter(family, blocks):
    stack, head = made(family, blocks)
    chain = stack.chain(head)
    tokens, c = [5, 9, 33], known(stack, 3)
    drafts, chances = chain(tokens, c, STEPS)
    for step in range(STEPS):
        given = torch.tensor([[token] for token in tokens])
        h = stack.embed(given, Step.span([0, 1, 2], [9] * 3, [1] * 3, stack.device, spill=16))[:, 0]
        z = head.adapter(h, c)
        logits, c = stack.logits(z, head), stack.finished(z)
        tokens = [row[step] for row in drafts]
        own = logits.gather(1, torch.searchsorted(head.ids, torch.tensor(tokens))[:, None])[:, 0]
        assert (own >= logits.max(-1).values - ROUNDING * logits.std(-1)).all()
        assert all(int(token) in head.ids for token in tokens)
        found = torch.tensor([row[step] for row in chances])
        torch.testing.assert_close(found, logits.softmax(-1).max(-1).values, rtol=0.15, atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_neither_company_nor_threads_change_a_draft(threads):
    stack, head = made(blocks=2)
    chain, tokens, c = stack.chain(head), [5, 9, 33, 7, 60], known(stack, 5)
    alone = [[part[0] for part in chain([token], c[i : i + 1], STEPS)] for i, token in enumerate(tokens)]

    def row_by_row(steps):
        return [list(own) for own in zip(*chain(tokens, c, steps), strict=True)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert row_by_row(STEPS) == alone
        assert row_by_row(2) == [[part[:2] for part in own] for own in alone]
    finally:
        torch.set_num_threads(before)


def test_an_embedding_is_scaled_as_the_model_does_it():
    stack, head = made()
    c = known(stack, 1)
    plain = stack.chain(head)([5], c, STEPS)
    stack.table, stack.embed_scale = stack.table / 4, 4.0
    assert stack.chain(head)([5], c, STEPS) == plain


@pytest.mark.parametrize(
    ("family", "given"),
    [("gemma", {}), ("llama", {"exit_layer": 2})],
    ids=["a norm in float32", "a deeper exit"],
)
def test_what_is_not_compiled_drafts_step_by_step(family, given):
    stack, head = made(family, **given)
    assert stack.chain(head) is None
    assert stack.chain(None) is None


def test_blocks_of_unequal_width_draft_step_by_step():
    """Compiled drafts have room for one width: a file with two must not write beyond it."""
    stack, head = made(blocks=2)
    weights = {name: weight.float() for name, weight in adapter_weights(stack.width, blocks=2).items()}
    weights["blocks.1.gate_up.weight"] = torch.randn(192, stack.width)
    weights["blocks.1.down.weight"] = torch.randn(stack.width, 96)
    uneven = replace(head, adapter=stack.adapter(weights, 0))
    assert stack.chain(head) is not None
    assert stack.chain(uneven) is None


def test_rounds_draft_in_one_call_and_cut_at_budget_and_end():
    """Rows of unequal budgets in one engine; the end of sequence among the drafts ends a draft."""
    stack, head = made()
    prompts = [[5, 9, 20, 33], [7, 8], [40]]
    plain = decode(stack, prompts, 12, rows=3)
    ends = [plain.tokens[0][6]]
    for eos in ([], ends):
        record = decode(stack, prompts, 12, 0, 3, rows=3, draft_head=head, eos=frozenset(eos))
        assert record.tokens == decode(stack, prompts, 12, rows=3, eos=frozenset(eos)).tokens
        drafts = [round.draft for rounds in record.rounds for round in rounds if round.draft]
        assert max(map(len, drafts)) == 3
        assert not any(token in eos for draft in drafts for token in draft[:-1])


@pytest.mark.parametrize("rows", [1, 3])
def test_drafts_are_cut_where_one_more_is_not_likely_enough(rows):
    """The same text at any price. Small weights make all tokens as likely: two in a row are one of 2,500."""
    stack, head = made()
    prompts = [[5, 9, 20, 33], [7, 8], [40]]
    plain = decode(stack, prompts, 12, rows=rows)
    for price, sure, longest in ((0.5, False, 0), (0.0, False, 1), (0.5, True, 3)):
        costs = RowCosts(((1, 1.0), (101, 1.0 + 100 * price)))
        arms = [Choice(0, 3, costs=costs)]
        controller = Controller(Prices(2, 1.0, 0.1), arms, trained=True, guard=False, timed=False)
        rows_of_head = torch.randn(50, stack.width, generator=torch.Generator().manual_seed(2)).bfloat16()
        own = stack.reduced_head(head.ids.tolist(), rows_of_head * (1000 if sure else 0.01))
        own = replace(own, adapter=head.adapter)
        record = decode(stack, prompts, 12, 0, 3, rows=rows, draft_head=own, controller=controller)
        assert record.tokens == plain.tokens
        drafts = [round.draft for rounds in record.rounds for round in rounds if round.source == "exit"]
        assert max(map(len, drafts)) == longest, (price, sure)


@pytest.mark.parametrize("width", [1, 7, 4096])
def test_the_best_is_torchs_first_of_the_largest(width):
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    x[1] = x[1].round()  # ties
    x[2] = -torch.inf
    x[3, width // 2] = torch.inf
    ids, values = found.best(x)
    assert torch.equal(values, x.max(-1).values)
    assert ids.tolist() == [int((row == row.max()).nonzero()[0]) for row in x]
    x[4, -1] = torch.nan
    assert found.best(x)[1].isnan().tolist() == [False] * 4 + [True]
