"""Requests, schedulers and their events for tests of the scheduler."""

from layerskip.decode.engine import Engine
from layerskip.decode.request import Request
from layerskip.decode.scheduler import Scheduler
from rounds import decode

PROMPTS = [[5, 6, 7], [9, 8], [3, 3, 3, 3], [11], [2, 4, 6]]


def outputs_alone(stack):
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
