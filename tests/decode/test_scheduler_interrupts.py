"""What may come between two lines of a step: interrupts, signal handlers, finalisers."""

import sys
import threading

import pytest
import torch

import tiny
from conftest import FULL
from layerskip.decode import scheduler as module
from layerskip.decode.scheduler import Status
from layerskip.errors import UserError
from scheduling import finish, outputs_alone, request, scheduler_of

BOTH = pytest.mark.parametrize("device_rounds", [False, True], ids=["host", "device"])


@pytest.fixture(scope="module")
def stack():
    return tiny.stack("llama")


@pytest.fixture(scope="module")
def alone(stack):
    return outputs_alone(stack)


@BOTH
@pytest.mark.parametrize("at", [1, 3, 6, 10, 15])
def test_after_an_interrupt_in_any_layer_call_the_outputs_are_the_same(
    stack, alone, monkeypatch, at, device_rounds
):
    scheduler = scheduler_of(stack, 2, device_rounds)
    tickets = [scheduler.submit(request(i)) for i in range(3)]
    run, calls = type(stack).run, []

    def interrupted(self, *arguments, **named):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return run(self, *arguments, **named)

    monkeypatch.setattr(type(stack), "run", interrupted)
    said = {ticket: [] for ticket in tickets}
    interrupts = 0
    while scheduler.busy:
        try:
            for ticket, event in scheduler.step():
                said[ticket] += event.tokens
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 1
    assert [said[ticket] for ticket in tickets] == alone[:3]


def test_rounds_committed_before_an_interrupt_are_told_by_the_next_step(stack, alone):
    scheduler, interrupts = scheduler_of(stack, 3), iter([False, False, True])

    def stop(token):
        if next(interrupts, False):
            raise KeyboardInterrupt
        return False

    tickets = [scheduler.submit(request(i)) for i in range(2)]
    tickets.append(scheduler.submit(request(2, stop=stop)))
    said = {ticket: [] for ticket in tickets}
    while scheduler.busy:
        try:
            for ticket, event in scheduler.step():
                said[ticket] += event.tokens
        except KeyboardInterrupt:
            continue
    assert [said[ticket] for ticket in tickets] == alone[:3]


def test_a_stop_function_is_asked_once_about_a_token_though_its_round_is_repeated(stack, alone):
    asked, interrupts = [], iter([False, False, False, True])

    def first(token):
        asked.append(token)
        if next(interrupts, False):
            raise KeyboardInterrupt
        return False

    scheduler = scheduler_of(stack, 1)
    ticket = scheduler.submit(request(0, stop=first))
    said = []
    while scheduler.busy:
        try:
            said += [token for _, event in scheduler.step() for token in event.tokens]
        except KeyboardInterrupt:
            asked.pop()  # it did not come to its answer
    assert ticket.status is Status.DONE
    assert said == asked == alone[0]


def test_an_interrupt_while_a_row_is_cleaned_loses_no_row(stack, monkeypatch):
    scheduler = scheduler_of(stack, 1)
    finish(scheduler, [scheduler.submit(request(0))])
    zero, calls = torch.Tensor.zero_, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return zero(self)

    monkeypatch.setattr(torch.Tensor, "zero_", interrupted)
    ticket = scheduler.submit(request(1))
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    monkeypatch.undo()
    finish(scheduler, [ticket])
    assert ticket.status is Status.DONE


class Between:
    """Acts between two lines of the scheduler, as a signal handler or a finaliser may: before the n-th line."""

    def __init__(self, at, act):
        self.at, self.act, self.lines = at, act, 0

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.act()  # not traced itself
        return self


def served(stack, at):
    """Serve three requests and a next turn; at one line cancel one, submit another, ask for that next turn too."""
    scheduler, tickets, late, said = scheduler_of(stack, 2), [], [], {}

    def next_turn(into):
        try:
            into.append(scheduler.submit(request(4), after=tickets[0]))
        except UserError:  # it is still generating, or the other one was faster
            scheduler.pause(tickets[0])

    def act():
        late.append(scheduler.submit(request(3)))
        if len(tickets) > 1:
            scheduler.cancel(tickets[1])
            next_turn(late)

    def drive():
        while scheduler.busy:
            for ticket, event in scheduler.step():
                if not isinstance(event, Exception):
                    said.setdefault(ticket, []).extend(event.tokens)

    def serve():
        sys.settrace(between)
        try:
            tickets.extend(scheduler.submit(request(i, keep=i == 0)) for i in range(3))
            drive()
            next_turn(tickets)
            drive()
            scheduler.cancel(tickets[0])
        finally:
            sys.settrace(None)
        drive()

    between = Between(at, act)
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), f"line {at}: it waits for itself"
    return scheduler, tickets, late, said, between.lines


def test_a_signal_handler_or_a_finaliser_may_submit_and_cancel_between_any_two_lines(stack, alone):
    """A lock was held: a finaliser of the same thread (an abandoned `run`) waited for it for ever."""
    lines = served(stack, 0)[-1]
    assert lines > 200
    for at in range(1, lines + 1, 1 if FULL else 29):
        scheduler, tickets, late, said, _ = served(stack, at)
        assert scheduler.engine.has_room, at
        assert {ticket.status for ticket in (*tickets, *late)} <= {Status.DONE, Status.CANCELLED}, at
        assert said[tickets[2]] == alone[2], at
        assert said[late[0]] == alone[3], at
