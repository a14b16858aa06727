"""An error ends its own row: of processors, stop functions, requests, numbers that are not."""

import gc
import traceback
import weakref

import pytest
import torch

import tiny
from layerskip.decode.engine import Engine
from layerskip.decode.language_model import LanguageModel
from layerskip.decode.sampling import Processing, Sampling
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


def test_a_request_that_cannot_be_added_leaves_every_row_free(stack):
    engine = Engine(stack, rows=1, capacity=32)
    with pytest.raises(TypeError):
        engine.add(request(0, seed=None))
    engine.add(request(0))


def test_a_tickets_error_tells_its_line_and_holds_no_tensor(stack):
    """A server that kept its failed tickets kept the logits of each, through the frames of the traceback."""
    held = []

    class Careless:
        def __call__(self, ids, scores):
            if ids.shape[1] < 7:
                return scores
            mine = scores.clone()
            held.append(weakref.ref(mine))
            try:
                raise KeyError("x")
            except KeyError as error:
                raise RuntimeError("no such law") from error

    scheduler = scheduler_of(stack)
    processing = Processing(Sampling(), (Careless(),))
    tickets = [scheduler.submit(request(0, processing=processing)), scheduler.submit(request(1, seed=None))]
    finish(scheduler, tickets)
    gc.collect()
    assert [type(ticket.error) for ticket in tickets] == [RuntimeError, TypeError]
    assert held
    assert not any(tensor() is not None for tensor in held)
    told = "".join(traceback.format_exception(tickets[0].error))
    assert 'raise KeyError("x")' in told
    assert 'raise RuntimeError("no such law") from error' in told
