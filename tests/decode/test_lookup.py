"""Drafts copied from the text so far: the same output, the same law, and copies only where they are worth it."""

import copy
import itertools

import pytest
import torch

import tiny
from conftest import FULL
from laws import FAILS, PASSES, exact_first_tokens, first_tokens, p_value, small_model
from layerskip.checkpoint.facts import Facts
from layerskip.decode import control
from layerskip.decode.control import LOOKUP, Choice, Controller, Copying, Prices
from layerskip.decode.engine import Engine
from layerskip.decode.language_model import LanguageModel
from layerskip.decode.request import Request
from layerskip.decode.rounds import host
from layerskip.decode.rounds.graphs import Graphs
from layerskip.decode.sampling import Processing, Sampling, accept
from layerskip.model.cost import RowCosts
from rounds import decode

L, NEW = tiny.NUM_LAYERS, 60 if FULL else 32
PROMPTS = [[5, 9, 20, 33, 5, 9, 20], list(range(7, 18)), [40]]
FREE = RowCosts(((1, 1.0), (64, 1.0)))
PRICES = Prices(L, 0.5, 0.5)


def controller(source, longest, timed=False):
    """One that copies wherever it can: positions are free."""
    arms = () if source == "lookup" else (Choice(1 if source.endswith("1") else 2, 3),)
    return Controller(PRICES, arms, copying=Copying(1, longest, FREE), trained=True, guard=False, timed=timed)


def repeating(stack):
    """Prompts that hold the beginning of what the model says, then something else, then themselves again."""
    for seed in range(60):
        [prompt] = torch.randint(
            2, tiny.VOCAB, (1, 5), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        plain = decode(stack, [prompt], 8).tokens[0]
        for cut in range(1, 9):
            yield prompt + plain[:cut] + [1] + prompt


def test_every_accepted_count_of_a_long_copy_occurs():
    stack, seen = tiny.stack("llama+native"), set()
    for told in repeating(stack):
        record = decode(stack, [told], 30, draft_length=8, drafter=LOOKUP)
        assert record.tokens == decode(stack, [told], 30).tokens
        seen |= {r.accepted for r in record.rounds[0] if len(r.draft) == 8}
        if seen == set(range(9)):
            return
    pytest.fail(f"never saw {set(range(9)) - seen} of 8 copied tokens kept")


@pytest.fixture(scope="module")
def forgetful():
    """A stack whose next token depends on the last one alone, a token, and the nine that it says behind that."""
    model = copy.deepcopy(tiny.calibrated("llama"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    stack = tiny.stack("llama+native", model=model)
    for first in range(2, tiny.VOCAB):
        said = decode(stack, [[first]], 9).tokens[0]
        if len({first, *said}) == 10:
            return stack, first, said
    pytest.fail("no first token leads to ten different ones")


@pytest.mark.parametrize("longest", [2, 4])
def test_an_end_of_sequence_is_copied_at_every_place_of_a_copy(forgetful, longest):
    stack, first, said = forgetful
    options = {"draft_length": longest, "drafter": LOOKUP}
    for offset, token in enumerate(said[1 : 1 + longest]):  # said[0] comes with the prompt
        record = decode(stack, [[first, *said, first]], 30, eos=frozenset([token]), **options)
        assert record.tokens == [said[: offset + 2]]
        assert record.eos_offsets == {offset: 1}


@pytest.mark.parametrize("longest", [2, 4])
def test_an_end_of_sequence_inside_a_copy_ends_the_output_there(longest):
    stack, rejected = tiny.stack("llama+native"), 0
    for told in itertools.islice(repeating(stack), 8):
        plain = decode(stack, [told], 30).tokens[0]
        for token in set(plain) & set(told):
            record = decode(stack, [told], 30, draft_length=longest, drafter=LOOKUP, eos=frozenset([token]))
            assert record.tokens[0] == plain[: plain.index(token) + 1]
            assert all(token not in round.draft[:-1] for round in record.rounds[0])
            rejected += record.rejected_eos
    assert rejected


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_budget_and_capacity_cut_a_copy(budget):
    stack, prompt = tiny.stack("llama"), [4, 4, 4, 4]
    plain = decode(stack, [prompt], 8).tokens[0]
    assert decode(stack, [prompt], budget, draft_length=8, drafter=LOOKUP).tokens == [plain[:budget]]
    tight = decode(stack, [prompt], 8, draft_length=8, drafter=LOOKUP, capacity=len(prompt) + budget)
    assert tight.tokens == [plain[: budget + 1]]


# -- sampling ------------------------------------------------------------------------------------------------


def test_accept_without_laws_is_accept_with_all_mass_on_each_draft():
    dice = torch.Generator().manual_seed(2)
    p = torch.rand(500, 5, 6, generator=dice, dtype=torch.float64) ** 3
    p[:, :, 2] = 0  # a token that cannot be drawn
    p /= p.sum(-1, keepdim=True)
    draft = torch.randint(0, 6, (500, 4), generator=dice)
    uniforms = torch.rand(500, 5, generator=dice, dtype=torch.float64)
    counts = torch.randint(0, 5, (500,), generator=dice)
    one_hot = torch.nn.functional.one_hot(draft, 6).double()
    for cut in (None, counts):
        for mine, theirs in zip(
            accept(draft, None, p, uniforms, cut), accept(draft, one_hot, p, uniforms, cut), strict=True
        ):
            assert torch.equal(mine, theirs)


def test_a_given_token_leaves_the_law_alone_in_closed_form():
    """P(keep x) + P(reject) x residual(x) over a fine grid of both uniforms is p, and the residual never has x."""
    p, x, n = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 1, 200
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    keep, following = (side.reshape(-1) for side in torch.meshgrid(grid, grid, indexing="ij"))
    laws = p.expand(n * n, 2, 3)
    kept, drawn = accept(torch.full((n * n, 1), x), None, laws, torch.stack([keep, following], 1))
    first = torch.where(kept > 0, x, drawn)
    assert torch.allclose(torch.bincount(first, minlength=3) / (n * n), p.float(), atol=1 / n)
    assert not (drawn[kept == 0] == x).any()


COPIES = {
    "lookup": {"draft_length": 3, "drafter": LOOKUP},
    "by chances": {"controller": lambda: controller("lookup", 3)},
    "both": {"controller": lambda: controller("both", 3), "exit_layer": 2},
}


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_sampled_rows_that_copy_follow_the_model(how, device):
    model = small_model()
    found = first_tokens(model, 3, 3000 if FULL else 800, device_rounds=device, **COPIES[how])
    assert p_value(found, exact_first_tokens(model, 3)) > PASSES


def test_a_copy_that_is_kept_too_often_is_detected(monkeypatch):
    """The negative control: a rejected token drawn again from p, itself included."""
    monkeypatch.setattr(host.sampling, "residual", lambda p, q, rejected: p)
    model = small_model()
    found = first_tokens(model, 3, 1500, draft_length=3, drafter=LOOKUP)
    assert p_value(found, exact_first_tokens(model, 3)) < FAILS


@pytest.mark.parametrize("sampling", [Sampling(0.9, top_k=12), Sampling(repetition_penalty=1.4)])
def test_under_the_fixed_policy_a_seed_repeats_and_company_does_not_matter(sampling):
    stack, processing = tiny.stack("llama"), Processing(sampling)
    prompts = [*PROMPTS, [3, 3, 3], [60, 2, 60]]

    def outputs(rows, device=False):
        each = lambda i: {"controller": controller("both", 6)}  # noqa: E731
        record = decode(
            stack, prompts, 24, 2, rows=rows, each=each, processing=processing, seed=5, device_rounds=device
        )
        return record.tokens, [[(r.draft, r.source) for r in rounds] for rounds in record.rounds]

    together = outputs(3)
    assert outputs(1) == outputs(5) == together
    sources = {source for rounds in together[1] for draft, source in rounds if draft}
    assert sources == {"exit", "lookup"}


# -- conversations, and what a user sets -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    model = tiny.random_model("llama", num_hidden_layers=6, vocab_size=260)
    return LanguageModel(tiny.stack("llama", model=model), tiny.tokenizer(), hf=model)


def test_a_conversation_copies_from_the_turns_before(lm):
    plain, copying = lm.chat(mode="ar", max_new_tokens=24), lm.chat(drafter="lookup", max_new_tokens=24)
    for message in ("say it", "again", "and again"):
        wanted, found = ([t for r in talk.send(message) for t in r.tokens] for talk in (plain, copying))
        assert found == wanted
    [row] = copying._engine._rows.values()
    assert row.history.counted_from == len(row.request.prompt) > 50, "the turns before are looked up"


def test_a_row_taken_over_by_another_text_copies_from_that_alone():
    engine = Engine(tiny.stack("llama"), rows=1, capacity=64)
    how, tokens = {"draft_length": 4, "drafter": LOOKUP, "keep": True}, []
    row = engine.add(Request([4, 4, 4, 4], 8, **how))
    while engine.busy:
        engine.step()
    engine.add(Request([4, 4, 5, 6, 5, 6], 8, **how), row)
    while engine.busy:
        tokens += [token for round in engine.step() for token in round.tokens]
    assert tokens == decode(tiny.stack("llama"), [[4, 4, 5, 6, 5, 6]], 8).tokens[0]


def test_match_min_and_copy_length_bound_every_copy(lm):
    text = "abc abd abc abd abc abd "
    for shortest, longest in ((1, 16), (1, 2), (2, 3)):
        rounds = lm.generate(
            text, match_min=shortest, copy_length=longest, max_new_tokens=60, policy="fixed"
        ).rounds
        copies = [round for round in rounds if round.source == LOOKUP]
        assert copies
        assert max(len(round.draft) for round in copies) <= longest
        assert all(round.exit_layer == 6 for round in copies)


def test_statistics_tell_the_sources_apart(lm):
    lm.facts = Facts(exits=(2,), exit_layer=2, draft_length=3)
    try:
        done = lm.generate("abab abab abab", max_new_tokens=60, policy="fixed", guard=False)
    finally:
        lm.facts = Facts()
    told = done.stats["by_source"]
    decoded = done.rounds[1:]
    assert set(told) == {round.source for round in decoded if round.draft} == {"exit", "lookup"}
    for source, own in told.items():
        rounds = [round for round in decoded if round.source == source and round.draft]
        counts = {"drafted": sum(r.drafted for r in rounds), "accepted": sum(r.accepted for r in rounds)}
        assert own == {"rounds": len(rounds), **counts}
    assert done.stats["plain_rounds"] == sum(not round.draft for round in decoded)
    assert done.stats["drafter"] == "auto"


# -- choosing --------------------------------------------------------------------------------------------------


def choices(chances, rows=1, costs=control.FLAT_ROW_COSTS, **how):
    made = Controller(PRICES, (), copying=Copying(1, 16, costs), timed=False, **how)
    return made.choose([chances] * rows)[0].draft_length


def test_a_copy_is_as_long_as_its_chances_are_worth():
    steep = RowCosts(((1, 1.0), (2, 1.3), (16, 3.0)))
    assert choices([]) == 0
    assert choices([0.95] * 16) == 16
    assert choices([0.95] * 16, costs=steep) > choices([0.8] * 16, costs=steep) > 0
    assert choices([0.05] * 16, costs=steep) == 0
    assert choices([0.5, 0.5, 0.01, 0.9]) == 2 or choices([0.5, 0.5, 0.01, 0.9]) == 3
    assert choices([0.25] * 4, costs=steep) == 0, "a quarter of a token is not worth 0.3 of a step and more"


def test_among_many_rows_a_copied_token_must_pay_for_the_positions_it_adds():
    linear = RowCosts(((1, 1.0), (32, 3.0)))
    assert choices([0.5] * 8, 1, linear) > choices([0.5] * 8, 8, linear)
    assert choices([0.9] * 8, 8, linear) > 0


def test_a_plain_step_and_a_copy_share_a_round():
    """One group: a row without a match must not wait for those that copy."""
    stack = tiny.stack("llama")
    prompts = [[4, 4, 4, 4, 4], [7, 8, 9, 10, 11]]
    each = lambda i: {"controller": controller("lookup", 4)}  # noqa: E731
    record = decode(stack, prompts, 20, each=each)
    by_step = {}
    for rounds in record.rounds:
        for round in rounds[1:]:
            by_step.setdefault(round.step_id, set()).add(round.source)
    assert {"plain", "lookup"} in by_step.values()


def test_copies_that_take_longer_than_they_bring_are_given_up():
    made = Controller(PRICES, (), copying=Copying(1, 8, FREE))
    used = []
    for _ in range(200):
        [choice] = made.choose([[0.3, 0.2]])
        drafted = choice.draft_length
        used.append(drafted)
        rows = [control.Drafted(drafted, 0, 1, {})]
        made.learn(choice, 1.0 + 2.0 * drafted, rows)
    assert used[0] > 0
    assert sum(map(bool, used[100:])) <= 4, (
        "tried again now and then: it may have been slow for a reason that is gone"
    )


def test_positions_of_many_rows_are_priced_by_what_they_took():
    """Eight rows, half of which could copy: the costs promise next to nothing for a position, a clock says more."""
    chances = [[0.6] * 4, []] * 4
    for position, copies in ((0.02, True), (0.5, False)):  # of a plain step
        made = Controller(PRICES, (), copying=Copying(1, 4, FREE), timed=True)
        lengths = []
        for _ in range(160):
            chosen = made.choose(chances)
            rows = [control.Drafted(c.draft_length, 0, 1, {}) for c in chosen]
            added = sum(row.drafted for row in rows)
            made.learn(max(chosen, key=lambda c: c.draft_length), 1.0 + position * added, rows)
            lengths.append(added)
        assert any(lengths[100:]) == copies


def test_a_slow_first_copy_does_not_shut_copies_off():
    """It may capture a graph or pack weights; one disturbed round later on changes little either."""
    costs = RowCosts(((1, 1.0), (16, 1.5)))
    made = Controller(PRICES, (), copying=Copying(1, 4, costs), timed=True)
    for _ in range(4):
        made.learn(made.plain, 0.02, [control.Drafted(0, 0, 1, {})])
    copied = []
    for turn in range(40):
        [choice] = made.choose([[0.9] * 4])
        copied.append(choice.draft_length)
        seconds = 1.0 if turn in (0, 12) else 0.02 * (1 + choice.draft_length / 30)
        made.learn(choice, seconds, [control.Drafted(choice.draft_length, choice.draft_length, 1, {})])
    assert min(copied[1:12]) > 0
    assert sum(length > 0 for length in copied[13:]) > 24


def test_padded_rows_copy_together_where_that_pays_together():
    """Each alone would not pay for the positions of all; eight of them do."""
    padded = Controller(
        PRICES, (), copying=Copying(1, 1, RowCosts(((1, 1.0), (8, 1.0), (16, 1.2))), True), timed=False
    )
    assert [c.draft_length for c in padded.choose([[0.3]] * 8)] == [1] * 8
    assert [c.draft_length for c in padded.choose([[0.3], *[[]] * 7])] == [0] * 8


def test_rows_of_a_step_draft_in_one_way():
    """Copies of some and exit drafts of others would read the weights twice."""
    exits = (Choice(1, 2),)
    made = Controller(Prices(30, 1.0, 0.2), exits, copying=Copying(1, 8, FREE), trained=True, guard=False)
    sources = [{c.source for c in made.choose(chances)} for chances in (
        [[]] * 4, [[0.9] * 8] * 4, [[0.9] * 8, [], [], []], [[0.2], [], [], []],
    )]  # fmt: skip
    assert sources == [{"exit"}, {LOOKUP}, {LOOKUP}, {"exit"}]


def test_a_probe_waits_for_a_round_without_copies_but_not_for_ever():
    made = Controller(Prices(30, 1.0, 0.2), (Choice(2, 4),), copying=Copying(1, 8, FREE))
    made.learn(made.plain, 1.0, [control.Drafted(0, 0, 1, {})])
    assert made.choose([[]])[0].probes
    probed = []
    for _ in range(200):
        [choice] = made.choose([[0.9] * 8])
        hits = dict.fromkeys(choice.probes, (0.0, 1))
        probed.append(bool(hits))
        made.learn(choice, 1.0, [control.Drafted(choice.draft_length, 0, 1, hits)])
    assert not probed[0]
    assert 0 < sum(probed) < 40


def test_copies_and_an_exit_are_compared_by_price_until_plain_steps_are_timed():
    """Seconds of the one against layers of the other would keep rows from copying."""
    exits = (Choice(1, 2),)
    made = Controller(Prices(30, 1.0, 0.2), exits, copying=Copying(1, 8, FREE), trained=True)
    for _ in range(8):
        made.learn(exits[0], 0.02, [control.Drafted(2, 1, 2, {})])
    assert made.choose([[]])[0] == exits[0]
    assert made.choose([[0.9] * 8])[0].source == LOOKUP
    for _ in range(40):
        made.learn(exits[0], 0.02, [control.Drafted(2, 0, 1, {})])
    assert made.choice().draft_length == 0, "and an exit that is never right gives way"


def test_a_controller_without_a_clock_measures_no_plain_steps():
    made = Controller(PRICES, (), copying=Copying(1, 8, FREE), timed=False)
    for _ in range(300):
        [choice] = made.choose([[0.9] * 8])
        assert choice.draft_length == 8
        made.learn(choice, 1.0, [control.Drafted(8, 8, 9, {})])


def test_copies_are_captured_at_few_shapes():
    captured = []

    def capture(function):
        captured.append(1)
        return function

    stack = tiny.stack("llama")
    each = lambda i: {"controller": controller("lookup", 16)}  # noqa: E731
    record = decode(stack, [[4, 4, 4, 4]], 60, each=each, device_rounds=True, capture=capture)
    assert record.tokens == decode(stack, [[4, 4, 4, 4]], 60).tokens
    assert isinstance(record.engine.device_rounds.graphs, Graphs)
    assert 1 <= len(captured) <= 8


def test_rows_that_copy_unlike_many_tokens_are_not_padded_where_the_stack_can_tell_them_apart():
    """Two rows copy, a third says something new: no position is computed for nothing, and the bits are the same."""
    prompts = [[4, 4, 4, 4, 4, 4], [7, 8, 9, 10, 11], [5, 6, 5, 6, 5, 6, 5]]
    each = lambda i: {"controller": controller("lookup", 5)}  # noqa: E731
    for name, padded in (("llama+native", False), ("llama", True)):
        stack = tiny.stack(name)
        alone = [decode(stack, [prompt], 24).tokens[0] for prompt in prompts]
        stack.counters.reset()
        record = decode(stack, prompts, 24, each=each)
        assert record.tokens == alone
        steps = {}
        for rounds in record.rounds:
            for round in rounds[1:]:
                steps.setdefault(round.step_id, []).append(len(round.draft) + 1)
        unequal = [counts for counts in steps.values() if len(set(counts)) > 1]
        assert unequal, "rows of one step copied unlike many tokens"
        plain = [counts for counts in steps.values() if set(counts) == {1}]
        assert stack.counters.runs[0, L, 1] == len(plain) + (0 if padded else len(unequal))
