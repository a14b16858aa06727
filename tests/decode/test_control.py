"""Who chooses E and K: controllers find the fastest way of decoding, and never change what is said."""

import random
from collections import Counter
from dataclasses import replace

import pytest

import tiny
from layerskip.decode.control import (
    LONGEST,
    Choice,
    Controller,
    Copying,
    Drafted,
    Prices,
    arms,
)
from layerskip.model.cost import RowCosts, expected_tokens
from rounds import Replayed, decode

PRICES = Prices(layers=30, head=8.0, draft_head=1.0)
EXITS = (4, 6, 8, 12)
MENU = arms(6, 4, 0.0, EXITS, adaptive=True)


class World:
    """Rounds as they would turn out: exits agree at known rates, layers take known time, clocks are noisy."""

    def __init__(self, agreement, seconds_per_layer=1e-3, overhead=1.0, seed=0):
        self.agreement, self.pace, self.overhead = agreement, seconds_per_layer, overhead
        self.chance = random.Random(seed).random

    def seconds(self, choice, noise=0.0):
        price = PRICES.round(choice.exit_layer, choice.draft_length)
        price += PRICES.draft_head if choice.probes else 0
        return price * self.pace * (self.overhead if choice.draft_length else 1.0) * (1 + noise)

    def round(self, choice):
        agree = self.agreement
        kept = next(
            (i for i in range(choice.draft_length) if self.chance() >= agree[choice.exit_layer]),
            choice.draft_length,
        )
        probed = {
            k: (float(sum(self.chance() < agree[k] for _ in range(kept + 1))), kept + 1)
            for k in choice.probes
        }
        seconds = self.seconds(choice, 0.2 * (self.chance() - 0.5))
        return seconds, Drafted(choice.draft_length, kept, kept + 1, probed)

    def drive(self, controller, rounds):
        """Let a controller choose; return its choices, and the tokens and seconds they gave."""
        choices, tokens, total = [], 0, 0.0
        for _ in range(rounds):
            choice = controller.choice()
            seconds, drafted = self.round(choice)
            controller.learn(choice, seconds, [drafted])
            choices.append(choice)
            tokens, total = tokens + drafted.committed, total + seconds
        return choices, tokens, total

    def fixed(self, choice):
        """Tokens per second of a choice that never changes."""
        return expected_tokens(choice.draft_length, self.agreement.get(choice.exit_layer, 0)) / self.seconds(
            choice
        )


PLAIN = Choice(30, 0)
AGREEMENTS = {
    "early exits are good": {4: 0.88, 6: 0.9, 8: 0.91, 12: 0.92},
    "only the deepest is": {4: 0.3, 6: 0.4, 8: 0.6, 12: 0.93},
    "short drafts": {4: 0.6, 6: 0.62, 8: 0.63, 12: 0.65},
    "none is": {4: 0.02, 6: 0.03, 8: 0.03, 12: 0.05},
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", AGREEMENTS)
def test_a_controller_comes_close_to_the_best_fixed_choice(name, trained):
    """Over its first 1024 tokens, whatever it believed of the exits before."""
    world = World(AGREEMENTS[name])
    best = max(world.fixed(choice) for choice in (PLAIN, *MENU))
    shares = []
    for seed in range(8):
        own = World(AGREEMENTS[name], seed=seed)
        controller = Controller(PRICES, MENU, trained=trained)
        tokens = seconds = 0
        while tokens < 1024:
            _, got, took = own.drive(controller, 1)
            tokens, seconds = tokens + got, seconds + took
        shares.append(tokens / seconds / best)
    shares.sort()
    wanted = 0.93 if trained else 0.9  # an untrained exit has to prove itself by sparse probes first
    assert shares[len(shares) // 2] > wanted, shares


def test_untrained_exits_cost_a_guarded_controller_next_to_nothing():
    world = World(AGREEMENTS["none is"])
    controller = Controller(PRICES, MENU[:1])
    choices, tokens, seconds = world.drive(controller, 256)
    assert tokens / seconds > 0.97 * world.fixed(PLAIN)
    assert not any(choice.draft_length for choice in choices)
    assert any(choice.probes for choice in choices), "it looks again and again"


def test_a_guard_falls_back_when_exits_turn_bad_and_comes_back_when_they_turn_good():
    good, bad = dict.fromkeys(EXITS, 0.9), dict.fromkeys(EXITS, 0.05)
    world, controller = World(good), Controller(PRICES, [Choice(6, 4)], trained=True)
    drafting = lambda choices: sum(c.draft_length > 0 for c in choices) / len(choices)  # noqa: E731
    assert drafting(world.drive(controller, 100)[0]) > 0.9
    world.agreement = bad
    world.drive(controller, 60)
    assert drafting(world.drive(controller, 100)[0]) < 0.1
    world.agreement = good
    world.drive(controller, 400)
    assert drafting(world.drive(controller, 100)[0]) > 0.9


def test_a_guard_believes_the_clock_and_not_the_prices():
    """Drafts that are all kept do not pay where the machine takes four times as long for them."""
    world = World(dict.fromkeys(EXITS, 0.95), overhead=4.0)
    controller = Controller(PRICES, [Choice(6, 4)], trained=True)
    world.drive(controller, 100)
    choices, tokens, seconds = world.drive(controller, 200)
    assert tokens / seconds > 0.9 * world.fixed(PLAIN)
    assert sum(c.draft_length > 0 for c in choices) < 40


def test_one_slow_round_changes_nothing():
    world, controller = World(dict.fromkeys(EXITS, 0.9)), Controller(PRICES, MENU, trained=True)
    world.drive(controller, 60)
    choice = controller.choice()
    before = controller.tokens_per_s(choice)
    controller.learn(choice, 50.0, [Drafted(choice.draft_length, choice.draft_length, 1, {})])
    assert controller.tokens_per_s(replace(choice, probes=())) > 0.8 * before


def test_slow_first_rounds_are_not_taken_for_the_pace():
    """A first round may capture a graph or pack weights: twenty times its later time, once."""
    world, met = World(AGREEMENTS["early exits are good"]), set()
    best = max(world.fixed(choice) for choice in (PLAIN, *MENU))
    controller, usual = Controller(PRICES, MENU, trained=True), world.seconds

    def seconds(choice, noise=0.0):
        first = replace(choice, probes=()) not in met
        met.add(replace(choice, probes=()))
        return usual(choice, noise) * (20 if first else 1)

    world.seconds = seconds
    world.drive(controller, 60)
    world.seconds = usual
    _, tokens, total = world.drive(controller, 200)
    assert tokens / total > 0.9 * best


def test_a_machine_that_was_slow_for_a_while_is_tried_again():
    world = World(dict.fromkeys(EXITS, 0.95), overhead=6.0)
    controller = Controller(PRICES, [Choice(6, 4)], trained=True)
    world.drive(controller, 100)
    world.overhead = 1.0
    world.drive(controller, 3 * 128)
    choices, *_ = world.drive(controller, 50)
    assert sum(c.draft_length > 0 for c in choices) > 40


def test_short_outputs_do_not_look_like_bad_drafts():
    """Their last rounds are cut by the budget: fewer drafts, fewer tokens."""
    controller = Controller(PRICES, [Choice(6, 8)], trained=True)
    for _ in range(3):
        controller.learn(PLAIN, 0.038, [Drafted(0, 0, 1, {})])
    for _ in range(60):
        controller.learn(Choice(6, 8), PRICES.round(6, 8) * 1e-3, [Drafted(8, 7, 8, {})])
        controller.learn(Choice(6, 8), PRICES.round(6, 1) * 1e-3, [Drafted(1, 1, 2, {})])
    speedup = controller.tokens_per_s(Choice(6, 8)) * 0.038
    assert speedup > 0.8 * expected_tokens(8, 0.94) * 38 / PRICES.round(6, 8)


def test_without_a_guard_every_round_drafts():
    world, controller = World(AGREEMENTS["none is"]), Controller(PRICES, MENU, guard=False)
    choices, *_ = world.drive(controller, 100)
    assert all(choice.draft_length for choice in choices)


def test_choosing_changes_nothing():
    world, controller = World(AGREEMENTS["short drafts"]), Controller(PRICES, MENU, trained=True)
    for _ in range(30):
        assert controller.choice() == controller.choice()
        world.drive(controller, 1)


def test_numbers_of_rows_are_timed_apart():
    """Four rows take twice as long as one; the controller of one row must not think itself slow for it."""
    controller = Controller(PRICES, [Choice(6, 4)], trained=True)
    row = Drafted(4, 3, 4, {})
    for _ in range(10):
        controller.learn(PLAIN, 0.04, [Drafted(0, 0, 1, {})])
        controller.learn(Choice(6, 4), 0.06, [row])
        controller.learn(PLAIN, 0.08, [Drafted(0, 0, 1, {})] * 4)
        controller.learn(Choice(6, 4), 0.5, [row] * 4)
    assert controller.choice(1).draft_length == 4
    assert controller.choice(3).draft_length == 0


def test_menus_hold_the_given_choice_and_at_most_four_by_four():
    for exit_layer, draft_length in ((6, 4), (4, 8), (12, 1), (8, 30)):
        menu = arms(exit_layer, draft_length, 0.0, EXITS, adaptive=True)
        assert Choice(exit_layer, draft_length) in menu
        assert len(menu) <= 16
        assert {choice.exit_layer for choice in menu} <= {exit_layer, *EXITS}
        assert max(choice.draft_length for choice in menu) <= max(draft_length, LONGEST)
    assert arms(6, 4, 0.3, EXITS, adaptive=False) == (Choice(6, 4, 0.3),)


# -- in the engine -------------------------------------------------------------------------------------------

L = tiny.NUM_LAYERS
PROMPTS = [[5, 9, 20, 33], list(range(7, 18)), [40]]


class Restless:
    """Choose another E, K and threshold every round, plain steps and probes among them."""

    copying, timed, plain = None, True, None

    def __init__(self):
        self.turn, self.seen = 0, []

    def rest(self, num_rows):
        return None

    def choose(self, chances):
        kinds = [
            Choice(2, 3), Choice(L, 0, probes=(1, 2)), Choice(1, 5, 0.3), Choice(4, 2, probes=(1, 2)),
            Choice(2, 0), Choice(3, 8, probes=(1, 2, 4)),
        ]  # fmt: skip
        return [kinds[self.turn % len(kinds)]] * len(chances)

    def learn(self, choice, seconds, rows):
        self.turn += 1
        self.seen += [(choice, row) for row in rows]


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama+native", "gemma2", "gpt2", "opt"])
def test_whatever_is_chosen_the_output_is_that_of_plain_decoding(family, device):
    stack, plain = tiny.stack(family), decode(tiny.stack(family), PROMPTS, 40).tokens
    capture = {"capture": Replayed()} if device else {}
    for prompts, wanted in ((PROMPTS, plain), (PROMPTS[:1], plain[:1])):
        controller = Restless()
        record = decode(stack, prompts, 40, 2, 3, controller=controller, device_rounds=device, **capture)
        assert record.tokens == wanted
        kinds = Counter((r.exit_layer, r.draft_length, r.source) for rounds in record.rounds for r in rounds)
        assert {(2, 3, "exit"), (L, 0, "plain"), (1, 5, "exit")} <= set(kinds)


@pytest.mark.parametrize("family", ["llama", "llama+native", "gemma2"])
def test_probes_tell_what_each_exit_would_have_said(family):
    """At every position up to the first rejected draft, against early-exit decoding of that very prefix."""
    stack, controller, agreed = tiny.stack(family), Restless(), Counter()
    record = decode(stack, PROMPTS[:1], 60, 2, 3, controller=controller)
    tokens = decode(stack, PROMPTS[:1], 70).tokens[0]
    at = 1  # the prompt's own pass has made a token
    for (_, row), round in zip(controller.seen, record.rounds[0][1:], strict=True):
        for k, (hits, seen) in row.agreements.items():
            assert seen == row.kept + 1
            places = range(at, at + seen)
            assert hits == sum(drafted(stack, [*PROMPTS[0], *tokens[:n]], k) == tokens[n] for n in places)
            agreed[k, hits > 0] += 1
        at += len(round.tokens)
    assert {k for k, some in agreed if some} == {1, 2, 4}
    assert family == "gemma2" or not all(some for _, some in agreed)


def drafted(stack, prefix, exit_layer):
    """What an exit says after a prefix."""
    return decode(stack, [prefix], 1, exit_layer, unverified=True).tokens[0][0]


def test_a_bad_start_does_not_end_an_adapter_that_runs_no_layer():
    for exit_layer, used in ((0, True), (1, False)):
        arm = Choice(exit_layer, 2)
        controller = Controller(Prices(L, 0.5, 0.05), (arm,), trained=True)
        for _ in range(12):
            controller.learn(arm, controller.prices.round(exit_layer, 2), [Drafted(2, 0, 1, {})])
        assert (controller.choice() == arm) == used
        for _ in range(60):
            controller.learn(arm, controller.prices.round(exit_layer, 2), [Drafted(2, 0, 1, {})])
        assert controller.choice().draft_length == 0


def test_a_plain_step_that_was_due_is_not_taken_for_a_choice():
    """The third of them makes plain steps known, and they are due more seldom from then on."""
    controller = Controller(Prices(L, 0.5, 0.5), (Choice(2, 3),))
    for _ in range(4):
        while not controller._plain_is_due(8):
            controller.learn(Choice(2, 3), 0.02, [Drafted(3, 3, 4, {})] * 8)
        controller.learn(controller.plain, 0.02, [Drafted(0, 0, 1, {})] * 8)
        assert controller.rest(8) is None
        assert controller._current == Choice(2, 3)


def test_plain_steps_of_few_rows_are_no_reason_to_rest():
    controller = Controller(Prices(L, 0.5, 0.5), (Choice(2, 3),))
    for _ in range(3):
        controller.learn(controller.plain, 0.01, [Drafted(0, 0, 1, {})])
    assert controller.rest(8) is None


def test_many_rows_copy_where_that_gains_clearly():
    costs = RowCosts(((1, 1.0), (4, 1.0), (8, 1.25)))
    for chance, copied in ((0.3, False), (0.5, True)):  # 1.04 and 1.2 times a plain step
        for timed in (True, False):
            controller = Controller(Prices(L, 0.5, 0.5), (), copying=Copying(1, 1, costs), timed=timed)
            lengths = [choice.draft_length for choice in controller.choose([[chance]] * 4)]
            assert any(lengths) == (copied or not timed)


def test_many_rows_rest_between_looks_while_plain_steps_are_best():
    controller = Controller(Prices(L, 0.5, 0.5), (Choice(2, 3),))
    assert controller.rest(8) is None
    looks = []
    for turn in range(50):
        assert controller.rest(3) is None
        if (rest := controller.rest(8)) is None:
            looks.append(turn)
            controller.learn(controller.plain, 0.01, [Drafted(0, 0, 1, {})] * 8)
        else:
            assert (rest.exit_layer, rest.draft_length, rest.unseen) == (L, 0, True)
            controller.learn(rest, 0.01, [Drafted(0, 0, 1, {})] * 8)
    assert looks == [0, 4, 12, 28, 44]  # more seldom as long as nothing comes of it
    controller.learn(Choice(2, 3), 0.01, [Drafted(3, 1, 2, {})] * 8)
    assert controller.rest(8) is None
    assert Controller(Prices(L, 0.5, 0.5), (Choice(2, 3),), timed=False).rest(8) is None
