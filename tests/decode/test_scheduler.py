"""The queue in front of the engine: order, statuses, threads, and errors that end one ticket and no other."""

import threading

import pytest
import torch

import tiny
from layerskip.decode.engine import Engine
from layerskip.decode.language_model import LanguageModel
from layerskip.decode.request import Request
from layerskip.decode.sampling import Processing, Sampling
from layerskip.decode.scheduler import Scheduler, Status
from layerskip.errors import UserError
from rounds import decode

PROMPTS = [[5, 6, 7], [9, 8], [3, 3, 3, 3], [11], [2, 4, 6]]
BOTH = pytest.mark.parametrize("device_rounds", [False, True], ids=["host", "device"])


@pytest.fixture(scope="module")
def stack():
    return tiny.stack("llama")


@pytest.fixture(scope="module")
def alone(stack):
    """What each prompt gives by itself, plainly."""
    return [decode(stack, [prompt], 12).tokens[0] for prompt in PROMPTS]


def request(index, **options):
    given = {"exit_layer": 2, "draft_length": 3, "index": index, **options}
    return Request(PROMPTS[index], 12, **given)


def scheduler_of(stack, rows=3, device_rounds=False):
    return Scheduler(Engine(stack, rows=rows, capacity=32, device_rounds=device_rounds))


def finish(scheduler, tickets):
    """Step to the end; tokens and error by ticket."""
    said, errors = {ticket: [] for ticket in tickets}, {}
    while scheduler.busy:
        for ticket, event in scheduler.step():
            if isinstance(event, Exception):
                errors[ticket] = event
            else:
                said[ticket] += event.tokens
    return [said[ticket] for ticket in tickets], [errors.get(ticket) for ticket in tickets]


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


class Broken:
    """A processor that raises `error` once its prefix has `after` tokens."""

    def __init__(self, after, error):
        self.after, self.error = after, error

    def __call__(self, ids, scores):
        if ids.shape[1] >= self.after:
            raise self.error
        return scores


@pytest.mark.parametrize(
    "error",
    [RuntimeError("out of luck"), ValueError("no state"), KeyError("x"), UserError("forbidden")],
    ids=repr,
)
def test_an_error_of_a_processor_ends_its_own_row_and_no_round_of_the_others_is_lost(stack, alone, error):
    """Anything but UserError left its group the oldest for ever, and a UserError cancelled innocent rows."""
    scheduler = scheduler_of(stack)
    greedy = Sampling()
    tickets = [
        scheduler.submit(
            request(i, processing=Processing(greedy, (Broken(7, error),)) if i == 1 else Processing())
        )
        for i in range(3)
    ]
    said, errors = finish(scheduler, tickets)
    assert [said[0], said[2]] == [alone[0], alone[2]]
    assert said[1] == alone[1][: len(said[1])]
    assert [errors[0], errors[2]] == [None, None]
    assert type(errors[1]) is type(error)
    assert (tickets[1].status, tickets[1].error) == (Status.FAILED, errors[1])
    assert scheduler.engine.has_room


class Counting:
    """A processor whose law depends on how often it was called along its row's own tokens: a stateful one."""

    def __init__(self):
        self.calls = 0

    def __call__(self, ids, scores):
        self.calls += 1
        scores[:, (7 * self.calls) % scores.shape[-1]] += 5.0
        return scores


def test_a_step_that_fails_leaves_no_trace_in_the_state_of_a_neighbours_processor(stack):
    """The state was written before anything was committed, so an innocent row went on from the wrong one."""
    mine = Processing(Sampling(temperature=0.8), (Counting(),))
    [wanted], _ = finish(one := scheduler_of(stack), [one.submit(request(0, processing=mine, seed=3))])
    for after in (6, 7, 8, 9):
        scheduler = scheduler_of(stack)
        broken = Processing(Sampling(), (Broken(after, RuntimeError("no")),))
        tickets = [
            scheduler.submit(request(0, processing=mine, seed=3)),
            scheduler.submit(request(2, processing=broken)),
        ]
        said, errors = finish(scheduler, tickets)
        assert said[0] == wanted
        assert errors[0] is None
        assert errors[1] is not None


@BOTH
def test_an_error_of_a_stop_function_ends_its_own_row_and_nothing_committed_is_lost(
    stack, alone, device_rounds
):
    scheduler = scheduler_of(stack, 3, device_rounds)
    seen = []

    def stop(token):
        seen.append(token)
        if len(seen) == 6:
            raise ZeroDivisionError
        return False

    tickets = [scheduler.submit(request(i, stop=stop if i == 1 else None)) for i in range(3)]
    said, errors = finish(scheduler, tickets)
    assert [said[0], said[2]] == [alone[0], alone[2]]
    assert isinstance(errors[1], ZeroDivisionError)
    assert said[1] == alone[1][: len(said[1])]
    assert len(said[1]) < 6, "tokens are appended once all of a round's are known to stay"


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


def test_one_dead_end_loses_no_other_result(stack, alone):
    lm = LanguageModel(stack, hf=tiny.calibrated("llama"))

    class DeadEnd:
        def __call__(self, ids, scores):
            if ids.shape[1] > 4 and ids[0, 0] == 9:  # the second prompt's
                raise ValueError("no way on")
            return scores

    options = {"max_new_tokens": 12, "logits_processor": [DeadEnd()], "exit_layer": 2, "eos_token_id": []}
    results = list(lm.each(PROMPTS, **options))
    assert [one.finish_reason for one in results] == ["length", "error", "length", "length", "length"]
    assert [one.tokens for i, one in enumerate(results) if i != 1] == [
        t for i, t in enumerate(alone) if i != 1
    ]
    assert results[1].tokens == alone[1][: len(results[1].tokens)]
    with pytest.raises(ValueError, match="no way on"):
        results[1].checked()
    with pytest.raises(ValueError, match="no way on"):
        lm.generate(PROMPTS, **options)


def test_a_nan_behind_a_rejected_draft_is_not_noticed_as_in_plain_decoding(stack, alone, monkeypatch):
    """It raised, where plain decoding would never have asked for that position."""
    logits = type(stack).logits

    def poisoned(self, h, head=None):
        out = logits(self, h, head)
        if out.dim() == 2 and len(out) == 4:  # a verification of three drafts of one row
            drafted = out.argmax(-1)
            wrong = next((i for i in range(3) if drafts and drafts[-3:][i] != drafted[i]), None)
            if wrong is not None and wrong < 3:
                out[wrong + 1 :] = torch.nan
                poisonings.append(wrong)
        elif out.dim() == 2:
            drafts.append(int(out.argmax(-1)[0]))
        return out

    drafts, poisonings = [], []
    monkeypatch.setattr(type(stack), "logits", poisoned)
    said, errors = finish(one := scheduler_of(stack), [one.submit(request(1))])
    assert poisonings, "some draft was rejected before the last position"
    assert errors == [None]
    assert said == [alone[1]]


def test_a_processor_that_gives_nan_ends_its_row_and_no_token_is_made_up(stack, alone):
    """The first NaN passed as the argmax: token 0 was committed without a word."""

    class NotANumber:
        def __call__(self, ids, scores):
            return torch.full_like(scores, torch.nan) if ids.shape[1] > 5 else scores

    for sampling in (Sampling(), Sampling(temperature=1.0)):
        scheduler = scheduler_of(stack)
        mine = Processing(sampling, (NotANumber(),))
        said, errors = finish(scheduler, [scheduler.submit(request(0, processing=mine))])
        assert isinstance(errors[0], UserError)
        assert len(said[0]) <= 3


def test_an_error_over_a_drafted_prefix_that_plain_decoding_never_meets_ends_nothing(stack, alone):
    """An exit drafted a prefix outside of a grammar kept as a table: KeyError ended a row that was right."""
    reached = {tuple(PROMPTS[1] + alone[1][:n]) for n in range(13)}

    class Table:
        def __call__(self, ids, scores):
            if tuple(ids[0].tolist()) not in reached:
                raise KeyError("no such prefix")
            return scores

    scheduler = scheduler_of(stack)
    mine = Processing(Sampling(), (Table(),))
    said, errors = finish(scheduler, [scheduler.submit(request(1, processing=mine))])
    assert (said, errors) == ([alone[1]], [None])


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


def test_a_request_that_cannot_be_added_leaves_every_row_free(stack):
    engine = Engine(stack, rows=1, capacity=32)
    with pytest.raises(TypeError):
        engine.add(request(0, seed=None))
    engine.add(request(0))


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


def test_a_controller_and_another_drafter_exclude_each_other():
    with pytest.raises(UserError, match="a controller chooses among exits"):
        request(0, controller=object(), drafter="parrot")
