"""An exit behind an adapter: the drafts are those of its definition, and what is decoded stays as it is."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

import tiny
from laws import ENGINE_VOCAB, FAILS, PASSES, exact_first_tokens, first_tokens, p_value, small_model
from layerskip.decode.control import LOOKUP, Choice, Controller, Copying, Prices
from layerskip.decode.drafters.exit import ExitDrafter
from layerskip.decode.engine import Engine
from layerskip.decode.request import Request
from layerskip.decode.sampling import Processing, Sampling
from layerskip.errors import UserError
from layerskip.model.adapter import scaled
from layerskip.model.cost import RowCosts
from layerskip.model.step import Step
from pairwise import matrix
from rounds import Replayed, decode

pytestmark = pytest.mark.matrix
L, NEW = tiny.NUM_LAYERS, 32
PROMPTS = [[5, 9, 20, 33, 5, 9, 20], list(range(7, 18)), [40]]
SHARES = (0.0, 0.3, 1.5)  # of what is remembered, at random: the more, the worse the drafts
FREE = RowCosts(((1, 1.0), (64, 1.0)))


def weights(width=32, share=0.3, blocks=1, seed=0, known=32):
    """An adapter that passes the exit's state on, disturbed by `share` of the remembered one."""
    generator = torch.Generator().manual_seed(seed)
    remembered = torch.randn(width, known, generator=generator) * share * width**-0.5
    made = {"join.weight": torch.cat([torch.eye(width), remembered], 1)}
    for i in range(blocks):
        made[f"blocks.{i}.gate_up.weight"] = torch.randn(96, width, generator=generator) * 0.1
        made[f"blocks.{i}.down.weight"] = torch.randn(width, 48, generator=generator) * 0.1
    return made


def head_of(stack, exit_layer=2, size=tiny.VOCAB, **given):
    known = stack.finished(torch.zeros(1, stack.width, dtype=stack.dtype)).shape[-1]
    adapter = stack.adapter(weights(stack.width, known=known, **given), exit_layer)
    return replace(stack.draft_head(size, None, ()), adapter=adapter)


@torch.inference_mode()
def drafted(stack, head, tokens, exit_layer, length):
    """What the adapter drafts behind `tokens`, by definition: everything anew from the first token."""

    def states(ids, depth):
        step = Step.span([0], [0], [len(ids)], stack.device, spill=len(ids))
        h = stack.embed(torch.tensor([ids]), step)
        return stack.run(h, 0, depth, step, stack.new_cache(1, len(ids)))[0][0]  # [T, D]

    known, made = stack.finished(states(tokens, L)[-2]), []
    for _ in range(length):
        z = head.adapter(states([*tokens, *made], exit_layer)[-1:], known[None])[0]
        made.append(int(head.ids[stack.logits(z, head).argmax()]))
        known = stack.finished(z)
    return made


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("exit_layer", [0, 2])
@pytest.mark.parametrize("family", ["llama", "llama+native", "gemma2+native", "gpt2", "opt"])
def test_drafts_are_those_of_the_definition(family, exit_layer, rows):
    """After kept and rejected drafts, in company, with rows that copied in between."""
    stack = tiny.stack(family, torch.float64 if "+" not in family else torch.float32)
    head, kept = head_of(stack, exit_layer, size=50), Counter()
    arms = (Choice(exit_layer, 3),)
    prices = Prices(L, 0.5, 0.5)
    controller = Controller(prices, arms, copying=Copying(2, 4, FREE), trained=True, guard=False, timed=False)
    record = decode(
        stack,
        PROMPTS,
        NEW,
        exit_layer,
        3,
        rows=rows,
        draft_head=head,
        device_rounds=False,
        controller=controller,
    )
    for prompt, rounds in zip(PROMPTS, record.rounds, strict=True):
        tokens = list(prompt)
        for round in rounds:
            if round.source == "exit":
                assert round.draft == drafted(stack, head, tokens, exit_layer, len(round.draft))
                kept[round.accepted] += 1
            elif round.source == LOOKUP:
                kept["copied"] += 1
            tokens += round.tokens
    assert kept["copied"]
    assert kept[0]
    assert sum(kept[i] for i in (1, 2, 3))


@pytest.mark.parametrize("family", tiny.STACKS)
def test_output_is_plain_decodings(family):
    """Whole in full runs: dtypes, exits, lengths, quality of the drafts, ragged rows, host and device rounds."""
    seen = {share: [0, 0] for share in SHARES}
    plain = {
        dtype: decode(tiny.stack(family, dtype), PROMPTS, NEW).tokens
        for dtype in (torch.float32, torch.float64)
    }
    cells = matrix([*plain], (0, 2, L - 1), (1, 4), SHARES, (False, True))
    for number, (dtype, exit_layer, length, share, device) in enumerate(cells):
        rows = (1, 3)[number.bit_count() % 2]  # one by one, or ragged: each meets every other value
        stack = tiny.stack(family, dtype)
        head = head_of(stack, exit_layer, share=share)
        options = {"rows": rows, "draft_head": head, "device_rounds": device}
        if device:
            options["capture"] = Replayed()
        record = decode(stack, PROMPTS, NEW, exit_layer, length, **options)
        assert record.tokens == plain[dtype], (dtype, exit_layer, length, share, rows, device)
        for round in itertools.chain(*record.rounds):
            seen[share][0] += round.accepted
            seen[share][1] += round.drafted
    rates = [kept / drafts for kept, drafts in seen.values()]
    assert min(rates) < 0.5 < max(rates) or min(rates) < max(rates) - 0.2, rates


@pytest.mark.parametrize(
    "processing", [Processing(), Processing(Sampling(temperature=0.9, top_k=40))], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("exit_layer", [0, 2])
@pytest.mark.parametrize("family", ["llama", "llama+native", "gpt2"])
def test_rounds_on_the_device_are_those_of_the_host(family, exit_layer, processing):
    stack = tiny.stack(family)
    told = []
    for options in (
        {"device_rounds": False},
        {"device_rounds": True},
        {"device_rounds": True, "capture": Replayed()},
    ):
        record = decode(
            stack,
            PROMPTS,
            NEW,
            exit_layer,
            4,
            draft_head=head_of(stack, exit_layer, size=50),
            processing=processing,
            seed=5,
            **options,
        )
        told.append([[(r.tokens, r.draft, r.accepted) for r in rounds] for rounds in record.rounds])
    assert told[0] == told[1] == told[2]


class Probing:
    """A controller that looks at an exit at every round and keeps what it is told."""

    copying, timed, plain = None, False, Choice(L, 0)

    def __init__(self, choice):
        self.chosen, self.told = choice, []

    def rest(self, num_rows):
        return None

    def choose(self, chances):
        return [self.chosen] * len(chances)

    def learn(self, choice, seconds, rows):
        self.told += [row.agreements[self.chosen.probes[0]] for row in rows]


@pytest.mark.parametrize("choice", [Choice(L, 0), Choice(3, 2)], ids=["plain", "exit 3"])
@pytest.mark.parametrize("probed", [0, 2])
@pytest.mark.parametrize("family", ["llama", "llama+native"])
def test_a_probe_asks_the_adapter_of_the_first_draft_behind_every_verified_token(family, probed, choice):
    stack = tiny.stack(family, torch.float64 if "+" not in family else torch.float32)
    head, controller = head_of(stack, probed), Probing(replace(choice, probes=(probed,)))
    record = decode(
        stack,
        PROMPTS[:1],
        NEW,
        draft_head=head,
        controller=controller,
        rows=1,
        capacity=80,
        device_rounds=False,
    )
    tokens, wanted = list(PROMPTS[0]), []
    for round in record.rounds[0]:
        if round.source != "prefill":
            seen = round.accepted + 1
            hits = 0
            for i in range(seen):
                known = [*tokens, *round.draft[:i]]
                following = [*round.draft[: round.accepted], *round.tokens[round.accepted :]][i : i + 1]
                hits += drafted(stack, head, known, probed, 1) == following
            wanted.append((hits, seen))
        tokens += round.tokens
    told = [(int(hits + 0.5), seen) for hits, seen in controller.told]
    assert told[:-1] == wanted[:-1]  # the last round may have been cut by the budget
    assert 0 < sum(hits for hits, _ in told) < sum(seen for _, seen in told)


@pytest.mark.parametrize("device_rounds", [False, True])
def test_sampling_draws_by_the_models_law(device_rounds):
    model = small_model()

    def head(stack):
        return head_of(stack, 1, size=ENGINE_VOCAB, share=1.0)

    options = {"exit_layer": 1, "draft_length": 3, "device_rounds": device_rounds, "head": head}
    assert p_value(first_tokens(model, 3, 300, **options), exact_first_tokens(model, 3)) > PASSES


def test_an_adapter_that_lies_about_its_law_is_seen(monkeypatch):
    """Control: a draft judged by another law than it was drawn from."""
    model, honest = small_model(), ExitDrafter.draft

    def lying(self, rows, limits):
        proposal = honest(self, rows, limits)
        for draft in proposal.drafts:
            draft.laws = [law.roll(1) for law in draft.laws]
        return proposal

    monkeypatch.setattr(ExitDrafter, "draft", lying)
    found = first_tokens(
        model, 2, 300, exit_layer=1, draft_length=3, head=lambda s: head_of(s, 1, size=4, share=1.0)
    )
    assert p_value(found, exact_first_tokens(model, 2)) < FAILS


def test_a_cache_that_grows_keeps_what_the_adapter_remembers():
    stack = tiny.stack("llama", torch.float64)
    head = head_of(stack)
    engine = Engine(stack, rows=1, capacity=16, draft_head=head)
    row = engine.add(Request(PROMPTS[0], 10, 2, 3, keep=True))
    while engine.busy:
        engine.step()
    tokens = engine.tokens(row)
    engine.grow(64)
    row = engine.add(Request([*tokens, 8, 9], 12, 2, 3, keep=True), row)
    tokens = [*tokens, 8, 9]
    for _ in range(6):
        for round in engine.step():
            if round.draft:
                assert round.draft == drafted(stack, head, tokens, 2, len(round.draft))
            tokens += round.tokens


def test_plain_decoding_beside_an_adapter_has_the_bits_of_the_model_alone():
    stack = tiny.stack("llama+native")
    alone = decode(stack, PROMPTS, NEW, logprobs=True)
    beside = decode(stack, PROMPTS, NEW, logprobs=True, draft_head=head_of(stack))
    assert beside.tokens == alone.tokens
    for one, other in zip(itertools.chain(*alone.rounds), itertools.chain(*beside.rounds), strict=True):
        assert one.logprobs == other.logprobs


def test_without_an_adapter_nothing_is_remembered():
    stack = tiny.stack("llama+native")
    assert Engine(stack, rows=1, capacity=8).cache.finals is None
    finals = Engine(stack, rows=2, capacity=8, draft_head=head_of(stack)).cache.finals
    assert finals.shape[:2] == (2, 1)
    assert finals.shape[-1] == stack.width


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_a_row_has_the_same_bits_in_any_company(blocks):
    adapter = tiny.stack("llama").adapter(weights(blocks=blocks), 2)
    h, c = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    together = adapter(h, c)
    assert together.shape == (9, 32)
    for i in range(9):
        assert torch.equal(adapter(h[i : i + 1], c[i : i + 1])[0], together[i])


def test_a_state_is_divided_by_its_root_mean_square():
    x = torch.tensor([[3.0, -4.0, 0.0, 0.0]])
    torch.testing.assert_close(scaled(x), x / 2.5)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"join.weight": torch.zeros(32, 32)}, "width 32"),
        ({"blocks.0.down.weight": torch.zeros(32, 47)}, "gate_up"),
        ({"other": torch.zeros(1)}, "not join.weight and blocks"),
        ({"join.weight": torch.full((32, 64), torch.nan)}, "not finite"),
        ({"join.weight": torch.zeros(32, 64, dtype=torch.int8)}, "not finite"),
    ],
)
def test_weights_that_are_no_adapter_are_refused(changed, told):
    with pytest.raises(UserError, match=told):
        tiny.stack("llama").adapter(weights() | changed, 2)
