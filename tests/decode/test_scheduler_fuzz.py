"""A fuzz of the scheduler: requests come, go, pause, fail and are interrupted at random; the innocent never notice.

Every request that did nothing wrong must give exactly the tokens of its single run, stateful processors included;
every ticket must end; no row and no memory may be lost. `LAYERSKIP_FULL=1` takes 5,000 steps and more.
"""

import random
import threading

import pytest
import torch

import tiny
from conftest import FULL
from layerskip.decode.control import Choice, Controller, Copying, Prices
from layerskip.decode.engine import Engine
from layerskip.decode.request import Request
from layerskip.decode.sampling import Processing, Sampling
from layerskip.decode.scheduler import Scheduler, Status
from layerskip.model.cost import RowCosts
from rounds import decode

ROWS, CAPACITY, NEW = 3, 40, 10
STEPS = 5_400 if FULL else 120
PROMPTS = [[5, 6, 7], [9, 8], [3, 3, 3, 3], [11], [2, 4, 6, 8, 10]]


class Counting:
    """A processor whose scores depend on how often it was called along its row's own tokens."""

    def __init__(self):
        self.calls = 0

    def __call__(self, ids, scores):
        self.calls += 1
        scores[:, (5 * self.calls) % scores.shape[-1]] += 4.0
        return scores


class Failing:
    """A processor that raises once its prefix is long enough."""

    def __init__(self, after, error):
        self.after, self.error = after, error

    def __call__(self, ids, scores):
        if ids.shape[1] >= self.after:
            raise self.error("on purpose")
        return scores


class NotANumber:
    """Gives NaN once its prefix is long enough, as a damaged row would."""

    def __init__(self, after):
        self.after = after

    def __call__(self, ids, scores):
        return torch.full_like(scores, torch.nan) if ids.shape[1] >= self.after else scores


ERRORS = (RuntimeError, ValueError, KeyError, ZeroDivisionError)
INNOCENT = {  # kinds of requests that do nothing wrong, and how they are made
    "greedy": dict,
    "sampled": lambda: {"processing": Processing(Sampling(temperature=0.9))},
    "stateful": lambda: {"processing": Processing(Sampling(temperature=0.7), (Counting(),))},
    "penalised": lambda: {"processing": Processing(Sampling(repetition_penalty=1.3))},
}
SHAPES = [(None, 0), (1, 2), (2, 3), (2, 5), (4, 1), ("copies", 4), ("both", 3)]


def drafting(exit_layer, length):
    """How a request of a shape drafts; copies are made wherever there is a match."""
    if exit_layer not in ("copies", "both"):
        return {"exit_layer": exit_layer, "draft_length": length}
    arms = (Choice(2, length),) if exit_layer == "both" else ()
    copying = Copying(1, length, RowCosts(((1, 1.0), (64, 1.0))))
    prices = Prices(tiny.NUM_LAYERS, 0.5, 0.5)
    return {"controller": Controller(prices, arms, copying=copying, trained=True, guard=False, timed=False)}


class Fuzz:
    """One seed's story: actions drawn at random, one engine and its scheduler."""

    def __init__(self, stack, seed, device_rounds):
        self.draw, self.stack = random.Random(seed), stack
        self.engine = Engine(
            stack, rows=ROWS, capacity=CAPACITY, device_rounds=device_rounds, prefill_chunk=2
        )
        self.scheduler = Scheduler(self.engine)
        self.said, self.key, self.ended = {}, {}, {}
        self.waited = {}
        self.kept = []  # tickets whose rows wait for a next turn
        self.steps = self.interrupts = 0

    def request(self):
        """A request and its key: what single run it must equal; None for one that will do something wrong."""
        draw = self.draw
        place, (exit_layer, length) = draw.randrange(len(PROMPTS)), draw.choice(SHAPES)
        options = {**drafting(exit_layer, length), "index": place, "seed": 7}
        kind = draw.choice([*INNOCENT, *INNOCENT, "failing", "nan", "stop", "rude stop"])
        key = None
        if kind in INNOCENT:
            options |= INNOCENT[kind]()
            key = (place, exit_layer, length, kind)
        elif kind == "failing":
            options["processing"] = Processing(
                Sampling(), (Failing(draw.randrange(1, 14), draw.choice(ERRORS)),)
            )
        elif kind == "nan":
            options["processing"] = Processing(
                Sampling(temperature=1.0), (NotANumber(draw.randrange(1, 14)),)
            )
        else:
            options["stop"] = self.stop(kind == "rude stop")
        return Request(PROMPTS[place], NEW, keep=draw.random() < 0.2, **options), key

    def stop(self, rude):
        """A stop function that raises, or cancels and submits others, at some token."""
        at, asked = self.draw.randrange(1, NEW), []

        def stop(token):
            asked.append(token)
            if len(asked) < at:
                return False
            if rude:
                raise self.draw.choice(ERRORS)("on purpose")
            if others := [t for t in self.said if t.status is Status.RUNNING]:
                self.cancel(self.draw.choice(others))
            self.submit()
            return True

        return stop

    def submit(self):
        request, key = self.request()
        after = self.kept.pop() if self.kept and self.draw.random() < 0.5 else None
        if after is not None and after.status is not Status.KEPT:
            after = None
        ticket = self.scheduler.submit(request, after)
        self.said[ticket], self.key[ticket], self.waited[ticket] = [], key, 0

    def cancel(self, ticket):
        self.key[ticket] = None
        self.scheduler.cancel(ticket)

    def step(self):
        self.steps += 1
        try:
            events = self.scheduler.step()
        except KeyboardInterrupt:
            self.interrupts += 1
            return
        for ticket, event in events:
            self.waited[ticket] = 0
            if isinstance(event, Exception):
                self.ended[ticket] = event
                continue
            self.said[ticket] += event.tokens
            if event.finish_reason:
                self.ended[ticket] = event.finish_reason
                if ticket.status is Status.KEPT:
                    self.kept.append(ticket)
        for ticket in self.waited:
            self.waited[ticket] += ticket.status is Status.RUNNING
        assert max(self.waited.values(), default=0) < 60, "nothing waits without bound"

    def act(self):
        choice = self.draw.random()
        running = [t for t in self.said if t.status in (Status.RUNNING, Status.WAITING)]
        if choice < 0.2 and len(running) < 8:
            self.submit()
        elif choice < 0.23 and running:
            self.cancel(self.draw.choice(running))
        elif choice < 0.26 and running:
            ticket = self.draw.choice(running)
            self.key[ticket] = None
            self.scheduler.pause(ticket)
            if ticket.status is Status.KEPT:
                self.kept.append(ticket)
        elif choice < 0.3 and (threads := [threading.Thread(target=self.submit)]):
            threads[0].start()
            threads[0].join()
        elif len(self.kept) >= ROWS:  # every row kept: nobody could go on
            self.scheduler.cancel(self.kept.pop())
        elif self.scheduler.busy:
            self.step()

    def finish(self):
        while self.scheduler.busy:
            while len(self.kept) >= ROWS:
                self.scheduler.cancel(self.kept.pop())
            self.step()
        for ticket in list(self.said):
            self.scheduler.cancel(ticket)


def single(stack, key, known):
    """The tokens of a request by itself."""
    if key not in known:
        place, exit_layer, length, kind = key
        options = {**INNOCENT[kind](), **drafting(exit_layer, length)}
        alone = decode(stack, [PROMPTS[place]], NEW, seed=7, each=lambda _: {"index": place}, **options)
        known[key] = alone.tokens[0]
    return known[key]


@pytest.mark.matrix
@pytest.mark.parametrize("device_rounds", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("name", ["llama", "llama+native"])
def test_the_innocent_have_the_tokens_of_their_single_runs(name, device_rounds, monkeypatch):
    stack = tiny.stack(name)
    known, taken, seed, innocent, interrupts, failed = {}, 0, 0, 0, 0, 0
    run, strike = type(stack).run, {"left": None}

    def struck(self, *arguments, **named):
        if strike["left"] is not None:
            strike["left"] -= 1
            if strike["left"] == 0:
                strike["left"] = None
                raise KeyboardInterrupt
        return run(self, *arguments, **named)

    while taken < STEPS:
        fuzz, seed = Fuzz(stack, seed, device_rounds), seed + 1
        monkeypatch.setattr(type(stack), "run", struck)
        for _ in range(150):
            if fuzz.draw.random() < 0.05:
                strike["left"] = fuzz.draw.randrange(1, 9)
            fuzz.act()
        strike["left"] = None
        fuzz.finish()
        monkeypatch.setattr(type(stack), "run", run)
        for ticket, key in fuzz.key.items():
            assert ticket.status in (Status.DONE, Status.FAILED, Status.CANCELLED), ticket
            if key is not None:
                wanted = single(stack, key, known)
                assert fuzz.said[ticket] == wanted, (seed, key)
                innocent += 1
        assert fuzz.engine.has_room
        assert fuzz.engine.cache.lengths == [0] * ROWS
        assert len(fuzz.engine.cache._free) == ROWS, "no row is lost, none given out twice"
        taken, interrupts = taken + fuzz.steps, interrupts + fuzz.interrupts
        failed += sum(isinstance(end, Exception) for end in fuzz.ended.values())
    assert innocent > taken / 40
    assert interrupts
    assert failed
