"""The queue in front of the engine: order, statuses, threads, rows that are kept for a next turn."""

import threading

import pytest

import tiny
from layerskip.decode.engine import Engine
from layerskip.decode.request import Request
from layerskip.decode.scheduler import Status
from layerskip.errors import UserError
from scheduling import PROMPTS, finish, outputs_alone, request, scheduler_of

BOTH = pytest.mark.parametrize("device_rounds", [False, True], ids=["host", "device"])


@pytest.fixture(scope="module")
def stack():
    return tiny.stack("llama")


@pytest.fixture(scope="module")
def alone(stack):
    return outputs_alone(stack)


@BOTH
def test_requests_get_rows_in_order_and_their_tokens_are_those_of_single_runs(stack, alone, device_rounds):
    scheduler = scheduler_of(stack, 2, device_rounds)
    tickets = [scheduler.submit(request(i)) for i in range(5)]
    assert {ticket.status for ticket in tickets} == {Status.WAITING}
    scheduler.step()
    assert [ticket.status for ticket in tickets] == [Status.RUNNING] * 2 + [Status.WAITING] * 3
    said, errors = finish(scheduler, tickets)
    assert [said[i][-6:] for i in range(5)] == [tokens[-6:] for tokens in alone]
    assert errors == [None] * 5
    assert {ticket.status for ticket in tickets} == {Status.DONE}
    assert scheduler.engine.has_room


@pytest.mark.parametrize("victim", [0, 1, 2], ids=["the row before", "itself", "the row behind"])
def test_a_stop_function_may_cancel_and_submit(stack, alone, victim):
    scheduler = scheduler_of(stack)
    tickets, late = [], []

    def stop(token):
        if not late:
            scheduler.cancel(tickets[victim])
            late.append(scheduler.submit(request(3)))
        return False

    tickets += [scheduler.submit(request(i, stop=stop if i == 1 else None)) for i in range(3)]
    said = {ticket: [] for ticket in tickets}
    while scheduler.busy:
        for ticket, event in scheduler.step():
            said.setdefault(ticket, []).extend(event.tokens)
    assert tickets[victim].status is Status.CANCELLED
    for i in {0, 1, 2} - {victim}:
        assert said[tickets[i]] == alone[i]
    assert said[late[0]] == alone[3]


def test_any_thread_may_submit_and_cancel_while_one_drives(stack, alone):
    scheduler, tickets, wrong = scheduler_of(stack, 3), {}, []
    keepers = [(worker, turn) for worker in range(4) for turn in range(6)]
    done = threading.Event()

    def work(worker):
        for turn in range(6):
            kept = scheduler.submit(request((worker + turn) % 5))
            tickets[worker, turn] = kept
            scheduler.cancel(scheduler.submit(request(turn % 5)))

    said = {}

    def drive():
        while not done.is_set() or scheduler.busy:
            for ticket, event in scheduler.step():
                if isinstance(event, Exception):
                    wrong.append(event)
                else:
                    said.setdefault(ticket, []).extend(event.tokens)

    driver = threading.Thread(target=drive)
    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in (driver, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    driver.join(60)
    assert not wrong
    assert {key: said[tickets[key]] for key in keepers} == {key: alone[sum(key) % 5] for key in keepers}
    assert scheduler.engine.has_room
    assert scheduler.engine.cache.lengths == [0] * 3


def test_a_request_that_comes_while_rows_are_given_out_waits_for_the_next_step(stack, alone):
    """It was taken for one that can never get a row."""
    scheduler = scheduler_of(stack)
    late, lock = [], scheduler._lock

    class Lock:
        def __enter__(self):
            return lock.__enter__()

        def __exit__(self, *error):
            lock.__exit__(*error)
            if len(late) == 1:  # behind `_admit`, which comes second
                late.append(None)
                late.append(scheduler.submit(request(0)))
            late.extend([None] * (not late))

    scheduler._lock = Lock()
    assert scheduler.step() == []
    said = []
    while scheduler.busy:
        for _, event in scheduler.step():
            said += event.tokens
    assert said == alone[0]


def test_a_second_driver_is_refused(stack):
    scheduler = scheduler_of(stack)
    refused = []

    def stop(token):
        for one in (scheduler, scheduler.engine):
            try:
                one.step()
            except UserError as error:
                refused.append(error.message)
        return True

    finish(scheduler, [scheduler.submit(request(0, stop=stop))])
    assert refused == ["two threads drive one scheduler", "two threads step one engine"]


def test_a_kept_row_serves_the_next_turn_and_is_free_when_cancelled(stack):
    scheduler = scheduler_of(stack, 1)
    first = scheduler.submit(request(0, keep=True))
    [said], _ = finish(scheduler, [first])
    assert first.status is Status.KEPT
    with pytest.raises(UserError, match="every row is kept"):
        list(scheduler.run([request(1)]))
    longer = Request([*PROMPTS[0], *said, 9], 4, 2, 3, keep=True)
    second = scheduler.submit(longer, after=first)
    assert first.status is Status.DONE
    computed = sum(event.prompt_tokens for _, event in scheduler.step())
    assert computed < 5, "the cache of the turn before is used"
    with pytest.raises(UserError, match="still generating"):
        scheduler.submit(longer, after=second)
    scheduler.pause(second)
    assert second.status is Status.KEPT
    scheduler.cancel(second)
    with pytest.raises(UserError, match="has left no row"):
        scheduler.submit(longer, after=second)
    assert scheduler.engine.has_room


def test_rows_that_go_on_do_not_overtake_prompts_that_wait(stack, alone):
    """A kept row that was given a new prompt went before waiting ones without bound."""
    scheduler = scheduler_of(stack, 2)
    turn = scheduler.submit(request(0, keep=True))
    finish(scheduler, [turn])
    other = scheduler.submit(request(1))
    scheduler.step()
    for _ in range(3):
        turn = scheduler.submit(request(0, keep=True), after=turn)
        scheduler.step()
        scheduler.pause(turn)
    assert scheduler.engine.tokens(other.row)[2:], "its prompt was read"


def test_abandoning_a_run_frees_its_rows(stack):
    scheduler = scheduler_of(stack, 2)
    events = scheduler.run([request(i) for i in range(5)])
    next(events)
    events.close()
    assert not scheduler.busy
    assert scheduler.engine.has_room


def test_a_capacity_beyond_the_context_and_unknown_rows_are_refused(stack):
    with pytest.raises(UserError, match="passes the model's context"):
        Engine(stack, rows=1, capacity=tiny.CONTEXT + 1)
    engine = Engine(stack, rows=1, capacity=8)
    for call in (engine.tokens, engine.pause):
        with pytest.raises(UserError, match="no row 3"):
            call(3)


def test_a_controller_and_another_drafter_exclude_each_other():
    with pytest.raises(UserError, match="a controller chooses among exits"):
        request(0, controller=object(), drafter="parrot")
